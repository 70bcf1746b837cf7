{{- define "stanchion.fullname" -}}
{{- default (default .Chart.Name .Values.nameOverride) .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "stanchion.serviceAccountName" -}}
{{- default (include "stanchion.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "stanchion.matchLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
{{- end -}}

{{- define "stanchion.labels" -}}
{{ include "stanchion.matchLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "stanchion.image" -}}
{{- if .Values.image.override -}}
{{ .Values.image.override }}
{{- else if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "stanchion.env" -}}
- {name: MY_NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
{{- with .Values.clusterName }}
- {name: CLUSTER_NAME, value: {{ . | quote }}}
{{- end }}
{{- with .Values.clusterEndpoint }}
- {name: CLUSTER_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- with .Values.startupTaint }}
- {name: STANCHION_STARTUP_TAINT, value: {{ . | quote }}}
{{- end }}
{{- if .Values.nodeCondition }}
- {name: STANCHION_NODE_CONDITION, value: "true"}
{{- end }}
{{- range $name, $value := .Values.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "stanchion.isTrue" -}}
{{- if has (. | toString | lower) (list "1" "t" "true") }}true{{ end -}}
{{- end -}}
