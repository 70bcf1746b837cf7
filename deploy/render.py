#!/usr/bin/env python3
"""Renders deploy/chart into deploy/manifests with Helm's own engine (PyPI: helm-python-sdk), lints it, and checks what other
values make of it.

    python3 -m venv /tmp/helm && /tmp/helm/bin/pip install helm-python-sdk==0.2.2
    /tmp/helm/bin/python deploy/render.py [--check]

--check writes nothing and fails when a manifest differs from what the chart renders; `cargo xtask test` runs it.
"""

import json
import pathlib
import sys

import helm_python

DEPLOY = pathlib.Path(__file__).resolve().parent
# Of the cluster that the manifests are for.
KUBERNETES = "1.35.0"
LOG_CONFIG = """\
merge: {under: log_processed}
redact: [{pattern: '(password|token)=\\S+', replace: '$1=***'}]
routes: [{files: ["kube-proxy-*"], group: "/aws/containerinsights/{cluster}/dataplane", stream: "{node}-{pod}"}]
journal: {}
"""
EVERYTHING = {
    "clusterName": "example",
    "clusterEndpoint": "https://0123456789ABCDEF.gr7.eu-west-1.eks.amazonaws.com",
    "startupTaint": "stanchion/not-ready",
    "nodeCondition": True,
    "env": {
        "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG": "true",
        "ENI_CONFIG_LABEL_DEF": "topology.kubernetes.io/zone",
        "ANNOTATE_POD_IP": "true",
        "NETWORK_POLICY_SOURCE": "policy-endpoints",
        "STANCHION_NODE_METRICS": "true",
        # As aws-node's DaemonSet has them.
        "DISABLE_INTROSPECTION": "false",
        "DISABLE_METRICS": "false",
        "HOST_CNI_BIN_PATH": "/host/opt/cni/bin",
        "HOST_CNI_CONFDIR_PATH": "/host/etc/cni/net.d",
    },
    "init": {"env": {"DISABLE_TCP_EARLY_DEMUX": "false", "ENABLE_V6_EGRESS": "false"}},
    "crd": {"create": True},
    "eniConfig": {"create": True, "region": "eu-west-1", "subnets": {"a": {"id": "subnet-0a", "securityGroups": ["sg-0a"]}}},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/stanchion"}},
    "telemetry": {
        "metricsAddress": "[::]:61680",
        "logConfig": LOG_CONFIG,
        "extraVolumeMounts": [{"name": "journal", "mountPath": "/run/log/journal", "readOnly": True}],
    },
    "extraVolumes": [{"name": "journal", "hostPath": {"path": "/run/log/journal", "type": "DirectoryOrCreate"}}],
    "podMonitor": {"create": True},
    "serviceMonitor": {"create": True},
}
MANIFESTS = {"stanchion.yaml": {}, "stanchion-all-features.yaml": EVERYTHING}
HEAD = "# Rendered from deploy/chart by deploy/render.py: change it there. Read MIGRATION.md before it meets a running cluster.\n"


def documents(values, kubernetes=KUBERNETES):
    chart = helm_python.Chart.load(str(DEPLOY / "chart"))
    chart.validate_schema(values)
    # What Chart.render asks, which has no argument for the version.
    release = {"name": "stanchion", "namespace": "kube-system", "kube_version": kubernetes}
    rendered = json.loads(helm_python._native.call_string("helm_render", chart._raw(), json.dumps(values), json.dumps(release)))
    found = []
    for path in sorted(rendered):
        if not path.endswith(".yaml"):
            continue
        for document in rendered[path].split("\n---"):
            if any(line.strip() and not line.lstrip().startswith("#") for line in document.splitlines() if line.strip() != "---"):
                found.append(document.strip("\n").removeprefix("---\n").rstrip() + "\n")
    return found


class Rendered:
    """The objects that some values render to."""

    def __init__(self, values, kubernetes=KUBERNETES):
        self.objects = [helm_python.values_from_yaml(document) for document in documents(values, kubernetes)]

    def of(self, kind):
        return [found for found in self.objects if found["kind"] == kind]

    @property
    def pod(self):
        return self.of("DaemonSet")[0]["spec"]["template"]

    def container(self, name):
        spec = self.pod["spec"]
        return next(container for container in spec["initContainers"] + spec["containers"] if container["name"] == name)

    def environment(self, name):
        """Each name once."""
        entries = self.container(name)["env"]
        names = [entry["name"] for entry in entries]
        assert len(set(names)) == len(names), f"{name}: a name is there twice: {sorted(names)}"
        return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}

    def may(self, verb, resource):
        return any(resource in rule["resources"] and verb in rule["verbs"] for rule in self.of("ClusterRole")[0]["rules"])


def the_schema_refuses_what_is_no_value():
    for bad in [{"image": {"pullPolicy": "Sometimes"}}, {"env": {"NETWORK_POLICY_ENFORCING_MODE": "off"}}, {"enabel": True}]:
        try:
            helm_python.Chart.load(str(DEPLOY / "chart")).validate_schema(bad)
        except helm_python.HelmError:
            continue
        raise AssertionError(f"{bad} passes")


def the_dashboards_are_in_the_chart():
    assert len(Rendered({"dashboards": {"create": True}}).of("ConfigMap")) == 2


def what_the_chart_sets_for_a_container_stands_over_the_environment_that_is_given():
    shipped_by_aws_node = {
        "DISABLE_METRICS": "false",
        "DISABLE_INTROSPECTION": "false",
        "HOST_CNI_BIN_PATH": "/opt/cni/bin",
        "HOST_CNI_CONFDIR_PATH": "/etc/cni/net.d",
        "MY_NODE_NAME": "x",
        "MY_POD_NAME": "x",
        "CLUSTER_NAME": "x",
        "CLUSTER_ENDPOINT": "x",
        "STANCHION_STARTUP_TAINT": "x",
        "STANCHION_NODE_CONDITION": "false",
    }
    as_list = [{"name": name, "value": value} for name, value in shipped_by_aws_node.items()]
    own = {"clusterName": "c", "clusterEndpoint": "https://e", "startupTaint": "t", "nodeCondition": True}
    for given in [{"env": shipped_by_aws_node}, {"extraEnv": as_list + as_list}, {"env": shipped_by_aws_node, "extraEnv": as_list}]:
        rendered = Rendered(own | given)
        telemetry, network = rendered.environment("telemetry"), rendered.environment("network")
        assert (telemetry["DISABLE_METRICS"], telemetry["DISABLE_INTROSPECTION"]) == ("true", "true"), telemetry
        assert (network["DISABLE_METRICS"], network["DISABLE_INTROSPECTION"]) == ("false", "false"), network
        assert (network["HOST_CNI_BIN_PATH"], network["HOST_CNI_CONFDIR_PATH"]) == ("/host/opt/cni/bin", "/host/etc/cni/net.d"), network
        for environment in [telemetry, network, rendered.environment("install")]:
            assert environment["MY_NODE_NAME"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
            assert environment["MY_POD_NAME"] == {"fieldRef": {"fieldPath": "metadata.name"}}
            assert environment["CLUSTER_NAME"] == "c" and environment["CLUSTER_ENDPOINT"] == "https://e", environment
            assert environment["STANCHION_STARTUP_TAINT"] == "t" and environment["STANCHION_NODE_CONDITION"] == "true", environment


def extra_env_stands_over_env_and_env_over_that_of_init():
    rendered = Rendered({
        "init": {"env": {"A": "init", "B": "init", "C": "init", "ENABLE_V6_EGRESS": True}},
        "env": {"B": "env", "C": "env", "ENABLE_V6_EGRESS": False},
        "extraEnv": [{"name": "Z", "value": "1"}, {"name": "C", "value": "early"}, {"name": "C", "value": "$(Z)"}],
    })
    for name in ["install", "network", "telemetry"]:
        environment = rendered.environment(name)
        assert [environment[key] for key in ["A", "B", "C", "ENABLE_V6_EGRESS"]] == ["init", "env", "$(Z)", "false"], environment
        # An entry may name those before it.
        assert list(environment)[-2:] == ["Z", "C"], environment


def numbers_are_written_out():
    numbers = {"STANCHION_POLICY_FLOWS": 1048576, "WARM_IP_TARGET": 0, "A": 8388608, "B": 1.5, "C": -12000000}
    for values in [{"env": numbers}, {"init": {"env": numbers}}]:
        environment = Rendered(values).environment("network")
        assert {name: environment[name] for name in numbers} == {name: str(value) for name, value in numbers.items()}, environment


def rights_follow_the_environment_wherever_it_is_given():
    needs = {
        ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"): [("watch", "eniconfigs"), ("patch", "cninodes")],
        ("ENABLE_POD_ENI", "1"): [("patch", "cninodes")],
        ("ANNOTATE_POD_IP", "True"): [("patch", "pods")],
        ("NETWORK_POLICY_SOURCE", "policy-endpoints"): [("watch", "policyendpoints"), ("watch", "clusterpolicyendpoints")],
        ("STANCHION_STARTUP_TAINT", "key"): [("patch", "nodes")],
        ("STANCHION_NODE_CONDITION", "true"): [("patch", "nodes/status")],
    }
    elsewhere = {"valueFrom": {"configMapKeyRef": {"name": "settings", "key": "x"}}}
    for (name, value), rights in needs.items():
        ways = [
            {"env": {name: value}},
            {"init": {"env": {name: value}}},
            {"extraEnv": [{"name": name, "value": value}]},
            {"extraEnv": [{"name": name} | elsewhere]},
            {"env": {name: ""}, "extraEnv": [{"name": name, "value": value}]},
        ]
        for values in ways:
            rendered = Rendered(values)
            for verb, resource in rights:
                assert rendered.may(verb, resource), f"{values}: no right to {verb} {resource}"
        off = Rendered({"env": {name: value}, "extraEnv": [{"name": name, "value": ""}]})
        for verb, resource in rights:
            assert not off.may(verb, resource), f"{name} is off: the right to {verb} {resource} is too much"


def only_what_is_read_without_network_policy_may_be_read():
    mode = "NETWORK_POLICY_ENFORCING_MODE"
    for none in [{"env": {mode: "none"}}, {"extraEnv": [{"name": mode, "value": "None"}]}]:
        for telemetry in [True, False]:
            rendered = Rendered(none | {"telemetry": {"enabled": telemetry}})
            assert rendered.may("watch", "services") == telemetry, f"{none}: services"
            for resource in ["namespaces", "networkpolicies", "endpointslices"]:
                assert not rendered.may("watch", resource), f"{none}: {resource}"
            assert not rendered.of("Role"), f"{none}: aws-node's ConfigMap, which is read beside policies"
    # Nobody here knows it.
    unknown = {"name": mode, "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "mode"}}}
    assert Rendered({"extraEnv": [unknown]}).may("watch", "networkpolicies")


def the_apparmor_profile_of_the_network_container_has_the_form_of_the_cluster():
    annotation = "container.apparmor.security.beta.kubernetes.io/network"
    localhost = {"type": "Localhost", "localhostProfile": "stanchion"}
    forms = {"Unconfined": "unconfined", "RuntimeDefault": "runtime/default", "Localhost": "localhost/stanchion"}
    for profile in [None, {"type": "Unconfined"}, {"type": "RuntimeDefault"}, localhost]:
        values = {"podAnnotations": {"a": "b"}, "network": {"securityContext": {"appArmorProfile": profile} if profile else {}}}
        wanted = profile or {"type": "Unconfined"}
        for kubernetes in ["1.30.0", "v1.30.14-eks-3abbec1", KUBERNETES]:
            rendered = Rendered(values, kubernetes)
            assert rendered.container("network")["securityContext"]["appArmorProfile"] == wanted, f"{kubernetes}: {values}"
            assert rendered.pod["metadata"]["annotations"] == {"a": "b"}, f"{kubernetes}: {values}"
        for kubernetes in ["1.29.0", "v1.29.15-eks-473151a"]:
            rendered = Rendered(values, kubernetes)
            assert "appArmorProfile" not in rendered.container("network")["securityContext"], f"{kubernetes}: {values}"
            assert rendered.pod["metadata"]["annotations"] == {"a": "b", annotation: forms[wanted["type"]]}, f"{kubernetes}: {values}"
    none = {"network": {"securityContext": {"appArmorProfile": None}}}
    for kubernetes in ["1.29.0", KUBERNETES]:
        rendered = Rendered(none, kubernetes)
        assert "appArmorProfile" not in rendered.container("network")["securityContext"], f"{kubernetes}: {none}"
        assert "annotations" not in rendered.pod["metadata"], f"{kubernetes}: {none}"


def the_settings_file_of_log_shipping_is_mounted_as_it_is_given():
    def restart(rendered):
        return rendered.pod["metadata"].get("annotations")

    texts = [LOG_CONFIG, "record: raw", "  # begins with spaces\n", "a: 1\r\n\tb\n---\n{{ .Values.x }}: 'é'  \n\n"]
    for text in texts:
        rendered = Rendered({"telemetry": {"logConfig": text}, "env": {"STANCHION_LOG_CONFIG": "/elsewhere"}})
        [settings] = rendered.of("ConfigMap")
        [volume] = [volume for volume in rendered.pod["spec"]["volumes"] if volume.get("configMap") == {"name": settings["metadata"]["name"]}]
        # The network container's flow log is made as the file says.
        for container in ["telemetry", "network"]:
            [mount] = [mount for mount in rendered.container(container)["volumeMounts"] if mount["name"] == volume["name"]]
            assert mount["readOnly"]
            name = rendered.environment(container)["STANCHION_LOG_CONFIG"].removeprefix(mount["mountPath"] + "/")
        assert settings["data"] == {name: text}, settings
        assert restart(rendered) != restart(Rendered({"telemetry": {"logConfig": text + "# changed\n"}}))
        assert restart(rendered) == restart(Rendered({"telemetry": {"logConfig": text}}))
        assert not Rendered({"telemetry": {"enabled": False, "logConfig": text}}).of("ConfigMap")
    without = Rendered({"env": {"STANCHION_LOG_CONFIG": "/elsewhere"}})
    assert without.environment("telemetry")["STANCHION_LOG_CONFIG"] == "/elsewhere"
    assert not without.of("ConfigMap") and restart(without) is None


def the_probes_ask_where_the_agent_answers():
    def asked(values):
        network = Rendered(values).container("network")
        return [sorted(set(network[probe]) & {"exec", "httpGet"}) for probe in ["livenessProbe", "readinessProbe"]]

    off = "DISABLE_INTROSPECTION"
    for values in [{}, {"env": {off: "false"}}, {"env": {off: "true"}, "extraEnv": [{"name": off, "value": "0"}]}]:
        assert asked(values) == [["httpGet"]] * 2, values
    for values in [{"env": {off: True}}, {"extraEnv": [{"name": off, "value": "1"}]}, {"env": {"INTROSPECTION_BIND_ADDRESS": "unix:/run/x"}}]:
        assert asked(values) == [["exec"]] * 2, values


def volumes_may_be_added_to_each_container():
    volume = {"name": "rules", "configMap": {"name": "rules"}}
    mount = {"name": "rules", "mountPath": "/etc/rules", "readOnly": True}
    for name in ["network", "telemetry"]:
        rendered = Rendered({"extraVolumes": [volume], name: {"extraVolumeMounts": [mount]}})
        assert volume in rendered.pod["spec"]["volumes"] and mount in rendered.container(name)["volumeMounts"], name
        [other] = {"network", "telemetry"} - {name}
        assert mount not in rendered.container(other)["volumeMounts"], other


def prometheus_asks_telemetry_where_it_serves():
    monitors = {"podMonitor": {"create": True, "relabelings": [{"action": "labeldrop"}]}, "serviceMonitor": {"create": True}}

    def asked(rendered):
        [pod], [service], [endpoints] = rendered.of("PodMonitor"), rendered.of("ServiceMonitor"), rendered.of("Service")
        by_pod = pod["spec"]["podMetricsEndpoints"]
        assert all(endpoint["relabelings"] == [{"action": "labeldrop"}] for endpoint in by_pod), by_pod
        ports = {port["name"]: port["port"] for port in endpoints["spec"]["ports"] if port["targetPort"] == port["name"]}
        names = [endpoint["port"] for endpoint in by_pod]
        assert [endpoint["port"] for endpoint in service["spec"]["endpoints"]] == names == list(ports), service
        return ports

    for address, port in [("[::]:61680", 61680), ("0.0.0.0:9100", 9100)]:
        # Turned off, the network container's own text is.
        rendered = Rendered(monitors | {"telemetry": {"metricsAddress": address}, "env": {"DISABLE_METRICS": "true"}})
        telemetry = rendered.container("telemetry")
        assert telemetry["ports"] == [{"name": "telemetry", "containerPort": port, "protocol": "TCP"}], telemetry["ports"]
        assert f"--metrics-address={address}" in telemetry["args"]
        assert rendered.environment("telemetry")["DISABLE_METRICS"] == "false"
        assert asked(rendered) == {"metrics": 61678, "telemetry": port}, address
    for nowhere in [{"telemetry": {"metricsAddress": ""}}, {"telemetry": {"enabled": False, "metricsAddress": "[::]:61680"}}]:
        assert asked(Rendered(monitors | nowhere)) == {"metrics": 61678}, nowhere


CHECKS = [
    the_schema_refuses_what_is_no_value,
    the_dashboards_are_in_the_chart,
    what_the_chart_sets_for_a_container_stands_over_the_environment_that_is_given,
    extra_env_stands_over_env_and_env_over_that_of_init,
    numbers_are_written_out,
    rights_follow_the_environment_wherever_it_is_given,
    only_what_is_read_without_network_policy_may_be_read,
    the_apparmor_profile_of_the_network_container_has_the_form_of_the_cluster,
    the_settings_file_of_log_shipping_is_mounted_as_it_is_given,
    the_probes_ask_where_the_agent_answers,
    volumes_may_be_added_to_each_container,
    prometheus_asks_telemetry_where_it_serves,
]


def main():
    check = "--check" in sys.argv[1:]
    problems = []
    for name, values in MANIFESTS.items():
        path = DEPLOY / "manifests" / name
        text = HEAD + "---\n".join(documents(values))
        if check and (not path.exists() or path.read_text() != text):
            problems.append(f"{path}: differs from what the chart renders: run deploy/render.py")
        elif not check:
            path.write_text(text)
    report = helm_python.lint(str(DEPLOY / "chart"), strict=True)
    print(report)
    for holds in CHECKS:
        try:
            holds()
        except Exception as problem:
            problems.append(f"{holds.__name__}: {problem!r}")
    print("\n".join(problems) or ("the manifests are what the chart renders" if check else "written"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
