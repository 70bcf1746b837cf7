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

{{- /* A value as the environment has it. Helm reads numbers as floats, which it would print with an exponent from a million on. */ -}}
{{- define "stanchion.value" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . | quote }}{{ else }}{{ quote . }}{{ end -}}
{{- end -}}

{{- /* A container's environment, each name once. Of equal names that counts which comes first: what the chart sets for the
container (a dict, the second argument), for all of them, extraEnv (its last entry, as in Kubernetes), env, init.env. */ -}}
{{- define "stanchion.env" -}}
{{- $values := (index . 0).Values -}}
{{- $own := index . 1 -}}
{{- with $values.clusterName }}{{ $_ := set $own "CLUSTER_NAME" . }}{{ end -}}
{{- with $values.clusterEndpoint }}{{ $_ := set $own "CLUSTER_ENDPOINT" . }}{{ end -}}
{{- with $values.startupTaint }}{{ $_ := set $own "STANCHION_STARTUP_TAINT" . }}{{ end -}}
{{- if $values.nodeCondition }}{{ $_ := set $own "STANCHION_NODE_CONDITION" "true" }}{{ end -}}
- {name: MY_NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
- {name: MY_POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: MY_POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: MY_POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
{{- range $name, $value := $own }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- $taken := set (set (set (set $own "MY_NODE_NAME" "") "MY_POD_NAME" "") "MY_POD_NAMESPACE" "") "MY_POD_UID" "" }}
{{- $extra := list }}
{{- range reverse (default list $values.extraEnv) }}
{{- if not (hasKey $taken .name) }}
{{- $_ := set $taken .name "" }}
{{- $extra = prepend $extra . }}
{{- end }}
{{- end }}
{{- $settings := dict }}
{{- range $given := list $values.init.env $values.env }}
{{- range $name, $value := $given }}
{{- if not (hasKey $taken $name) }}{{ $_ := set $settings $name $value }}{{ end }}
{{- end }}
{{- end }}
{{- range $name, $value := $settings }}
- {name: {{ $name }}, value: {{ include "stanchion.value" $value }}}
{{- end }}
{{- with $extra }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* What the containers' environment says of a setting, in small letters; "?" where only the node knows (valueFrom). */ -}}
{{- define "stanchion.setting" -}}
{{- $name := index . 1 -}}
{{- range include "stanchion.env" (list (index . 0) (dict)) | fromYamlArray -}}
{{- if eq .name $name }}{{ if .valueFrom }}?{{ else }}{{ default "" .value | toString | lower }}{{ end }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* Whether a setting is true, or may be. */ -}}
{{- define "stanchion.isTrue" -}}
{{- if has (include "stanchion.setting" .) (list "1" "t" "true" "?") }}true{{ end -}}
{{- end -}}

{{- /* The port of telemetry's own Prometheus text; empty where there is none. */ -}}
{{- define "stanchion.telemetryPort" -}}
{{- if .Values.telemetry.enabled }}{{ regexFind "[0-9]+$" .Values.telemetry.metricsAddress }}{{ end -}}
{{- end -}}
