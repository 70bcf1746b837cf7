#!/usr/bin/env python3
"""Renders deploy/chart into deploy/manifests with Helm's own engine (PyPI: helm-python-sdk) and lints it.

    python3 -m venv /tmp/helm && /tmp/helm/bin/pip install helm-python-sdk==0.2.2
    /tmp/helm/bin/python deploy/render.py [--check]

--check writes nothing and fails when a manifest differs from what the chart renders; `cargo xtask test` runs it.
"""

import pathlib
import sys

import helm_python

DEPLOY = pathlib.Path(__file__).resolve().parent
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
    },
    "crd": {"create": True},
    "eniConfig": {"create": True, "region": "eu-west-1", "subnets": {"a": {"id": "subnet-0a", "securityGroups": ["sg-0a"]}}},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/stanchion"}},
    "podMonitor": {"create": True},
    "serviceMonitor": {"create": True},
}
MANIFESTS = {"stanchion.yaml": {}, "stanchion-all-features.yaml": EVERYTHING}


def render(values):
    chart = helm_python.Chart.load(str(DEPLOY / "chart"))
    chart.validate_schema(values)
    rendered = chart.render(values, name="stanchion", namespace="kube-system")
    text = []
    for path in sorted(rendered):
        if not path.endswith(".yaml"):
            continue
        for document in rendered[path].split("\n---"):
            if any(line.strip() and not line.lstrip().startswith("#") for line in document.splitlines() if line.strip() != "---"):
                text.append(document.strip("\n").removeprefix("---\n").rstrip() + "\n")
    head = "# Rendered from deploy/chart by deploy/render.py: change it there. Read MIGRATION.md before it meets a running cluster.\n"
    return head + "---\n".join(text)


def main():
    check = "--check" in sys.argv[1:]
    problems = []
    for name, values in MANIFESTS.items():
        path = DEPLOY / "manifests" / name
        text = render(values)
        if check and (not path.exists() or path.read_text() != text):
            problems.append(f"{path}: differs from what the chart renders: run deploy/render.py")
        elif not check:
            path.write_text(text)
    report = helm_python.lint(str(DEPLOY / "chart"), strict=True)
    print(report)
    for bad in [{"image": {"pullPolicy": "Sometimes"}}, {"env": {"NETWORK_POLICY_ENFORCING_MODE": "off"}}, {"enabel": True}]:
        try:
            helm_python.Chart.load(str(DEPLOY / "chart")).validate_schema(bad)
            problems.append(f"the schema lets {bad} pass")
        except helm_python.HelmError:
            pass
    dashboards = render({"dashboards": {"create": True}})
    if dashboards.count("kind: ConfigMap") < 2:
        problems.append("the dashboards are not in the chart")
    print("\n".join(problems) or "the manifests are what the chart renders" if check else "written")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
