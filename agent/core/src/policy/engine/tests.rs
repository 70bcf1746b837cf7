//! The engine by its map image, policy by policy.

use super::*;
use crate::manifests;
use crate::policy::maps::image_allows;

const CLUSTER: &str = r#"
{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},"status":{"addresses":[{"type":"InternalIP","address":"10.0.0.1"}]}}
{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"x"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","namespace":"x","labels":{"pod":"a"}},"spec":{"nodeName":"n1"},"status":{"podIP":"192.168.1.1"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"b","namespace":"x","labels":{"pod":"b"}},"spec":{"nodeName":"n2"},"status":{"podIP":"192.168.1.2"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"c","namespace":"x","labels":{"pod":"c"}},"spec":{"nodeName":"n2"},"status":{"podIP":"192.168.1.3"}}
"#;
const POLICY: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"p","namespace":"x"},
    "spec":{"podSelector":{"matchLabels":{"pod":"a"}},"ingress":[{"from":[{"podSelector":{"matchLabels":{"pod":"b"}}}],"ports":[{"port":80}]}]}}"#;

fn cluster(texts: &[&str]) -> Arc<ClusterState> {
    let objects = texts.iter().flat_map(|text| manifests::parse("test.json", text).unwrap());
    Arc::new(ClusterState::default().replaced_by(objects))
}

/// Deleted by force, it runs on until its sandbox goes.
#[test]
fn a_pod_whose_object_is_gone_stays_policed() {
    let without: Vec<&str> = CLUSTER.lines().filter(|line| !line.contains(r#""name":"a""#)).collect();
    let without = cluster(&[&without.join("\n"), POLICY]);
    for unknown_pod in [UnknownPod::Open, UnknownPod::Closed] {
        let mut engine = Engine::new(Settings { node_name: "n1".into(), unknown_pod, ..Settings::default() });
        let (name, own) = (PodName::new("x", "a"), "192.168.1.1".parse().unwrap());
        let from = |engine: &Engine, peer: &str| image_allows(engine.image(), Slot(1), Direction::Ingress, peer.parse().unwrap(), 6, 80);
        engine.set_cluster(&cluster(&[CLUSTER, POLICY]));
        engine.add_endpoint(Slot(1), &name, "", &[own]);
        engine.set_cluster(&without);
        assert!(!engine.knows(&name, ""));
        assert!(from(&engine, "192.168.1.2") && !from(&engine, "192.168.1.3"), "{unknown_pod:?}");
        // Another pod in its place has nothing of it.
        engine.add_endpoint(Slot(1), &PodName::new("x", "new"), "", &[own]);
        assert_eq!(from(&engine, "192.168.1.3"), unknown_pod == UnknownPod::Open);
    }
}

/// The maps remember that it was policed, and not by what.
#[test]
fn a_pod_whose_object_went_while_no_agent_ran_is_not_opened() {
    let (name, own) = (PodName::new("x", "a"), "192.168.1.1".parse().unwrap());
    let without: Vec<&str> = CLUSTER.lines().filter(|line| !line.contains(r#""name":"a""#)).collect();
    let without = cluster(&[&without.join("\n"), POLICY]);
    let engine = || Engine::new(Settings { node_name: "n1".into(), unknown_pod: UnknownPod::Open, ..Settings::default() });
    let passes =
        |engine: &Engine, direction, peer: &str, port| image_allows(engine.image(), Slot(1), direction, peer.parse().unwrap(), 6, port);
    let mut first = engine();
    first.set_cluster(&cluster(&[CLUSTER, POLICY]));
    first.add_endpoint(Slot(1), &name, "", &[own]);
    let mut next = engine();
    next.rebase(first.image().clone());
    next.add_endpoint(Slot(1), &name, "", &[own]);
    assert!(passes(&next, Direction::Ingress, "192.168.1.2", 80), "what was in force stays until the cluster is known");
    let ops = next.set_cluster(&without);
    let mut image = first.image().clone();
    for op in &ops {
        image.apply(op);
        assert!(!image_allows(&image, Slot(1), Direction::Ingress, "192.168.1.3".parse().unwrap(), 6, 80), "{op:?}");
    }
    assert!(!passes(&next, Direction::Ingress, "192.168.1.2", 81));
    assert!(passes(&next, Direction::Ingress, "10.0.0.1", 81), "the own node");
    assert!(passes(&next, Direction::Egress, "192.168.1.3", 80), "what was not isolated is not");
    // Its object comes again, or it was only late.
    next.set_cluster(&cluster(&[CLUSTER, POLICY]));
    assert!(passes(&next, Direction::Ingress, "192.168.1.2", 80) && !passes(&next, Direction::Ingress, "192.168.1.3", 80));
    // A pod that comes now and is not known has nothing of it.
    next.set_cluster(&without);
    next.add_endpoint(Slot(2), &PodName::new("x", "new"), "", &["192.168.1.9".parse().unwrap()]);
    assert!(image_allows(next.image(), Slot(2), Direction::Ingress, "192.168.1.3".parse().unwrap(), 6, 80));
}

/// The agent starts beside a pod that the API server does not know, on an address of which it still tells another pod.
#[test]
fn what_an_unknown_pod_leaves_is_again_whose_the_cluster_says() {
    let mut engine = Engine::new(Settings { node_name: "n1".into(), unknown_pod: UnknownPod::Open, ..Settings::default() });
    engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
    let address: IpAddr = "192.168.1.2".parse().unwrap();
    engine.add_endpoint(Slot(2), &PodName::new("x", "unknown"), "", &[address]);
    engine.set_cluster(&cluster(&[CLUSTER, POLICY]));
    let passes = |engine: &Engine| image_allows(engine.image(), Slot(1), Direction::Ingress, address, 6, 80);
    assert!(!passes(&engine), "nothing is known of who has it");
    engine.remove_endpoint(Slot(2));
    assert!(passes(&engine));
}

#[test]
fn what_goes_makes_room_for_what_comes() {
    let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
    engine.set_cluster(&cluster(&[CLUSTER, POLICY]));
    engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
    let moved = CLUSTER.replace("192.168.1.2", "192.168.1.4").replace(r#""name":"b""#, r#""name":"b2""#);
    let ops = engine.set_cluster(&cluster(&[&moved, POLICY]));
    let at = |wanted: &dyn Fn(&MapOp) -> bool| ops.iter().position(wanted).unwrap_or_else(|| panic!("{ops:?}"));
    let gone: IpAddr = "192.168.1.2".parse().unwrap();
    let came: IpAddr = "192.168.1.4".parse().unwrap();
    let gone = at(&|op| *op == MapOp::RemoveAddress(gone));
    assert!(gone < at(&|op| matches!(op, MapOp::SetAddress(address, _) if *address == came)), "{ops:?}");
}

/// The runtime knows a static pod by another uid than the API server.
#[test]
fn a_static_pod_is_policed() {
    let mirror = CLUSTER.replace(
        r#""labels":{"pod":"a"}"#,
        r#""labels":{"pod":"a"},"uid":"b7e1","annotations":{"kubernetes.io/config.hash":"49bc","kubernetes.io/config.mirror":"49bc"}"#,
    );
    let mut engine = Engine::new(Settings { node_name: "n1".into(), unknown_pod: UnknownPod::Open, ..Settings::default() });
    engine.set_cluster(&cluster(&[&mirror, POLICY]));
    let (name, own) = (PodName::new("x", "a"), "192.168.1.1".parse().unwrap());
    for (uid, is_known) in [("b7e1", true), ("49bc", true), ("", true), ("0000", false)] {
        assert_eq!(engine.knows(&name, uid), is_known, "{uid}");
        engine.add_endpoint(Slot(1), &name, uid, &[own]);
        let passes = image_allows(engine.image(), Slot(1), Direction::Ingress, "192.168.1.3".parse().unwrap(), 6, 80);
        assert_eq!(passes, !is_known, "{uid}");
    }
}

/// Connections that stand go on: of new ones kube-proxy makes none.
#[test]
fn a_connection_through_a_service_outlives_the_readiness_of_its_backends() {
    const EGRESS: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"p","namespace":"x"},
        "spec":{"podSelector":{"matchLabels":{"pod":"a"}},"policyTypes":["Egress"],"egress":[{"to":[{"podSelector":{"matchLabels":{"pod":"b"}}}]}]}}"#;
    const SERVICE: &str = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"x"},"spec":{"clusterIP":"172.20.0.9","ports":[{"port":80}]}}"#;
    let slice = |conditions: &str| {
        format!(
            r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s-1","namespace":"x","labels":{{"kubernetes.io/service-name":"s"}}}},
            "addressType":"IPv4","endpoints":[{{"addresses":["192.168.1.2"],"conditions":{{{conditions}}}}}],"ports":[{{"port":8080}}]}}"#
        )
    };
    let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
    engine.set_cluster(&cluster(&[CLUSTER, EGRESS, SERVICE, &slice(r#""ready":true"#)]));
    engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
    let passes = |engine: &Engine| image_allows(engine.image(), Slot(1), Direction::Egress, "172.20.0.9".parse().unwrap(), 6, 80);
    let revision = |engine: &Engine| engine.image().endpoints[&Slot(1)].revision;
    assert!(passes(&engine));
    let before = revision(&engine);
    engine.set_cluster(&cluster(&[CLUSTER, EGRESS, SERVICE, &slice(r#""ready":false,"serving":false"#)]));
    assert!(passes(&engine) && revision(&engine) == before);
}

/// AWS's controller lists a pod once it has an address, which is after its start.
#[test]
fn a_pod_that_a_resolved_policy_selects_is_policed_before_it_is_listed() {
    let part = |kind: &str, metadata: &str, selector: &str| {
        format!(
            r#"{{"apiVersion":"networking.k8s.aws/v1alpha1","kind":"{kind}","metadata":{metadata},"spec":{{"policyRef":{{"name":"p"}},{selector},
            "podSelectorEndpoints":[],"podIsolation":["Ingress"],"tier":"Admin","ingress":[{{"cidr":"192.168.1.3","action":"Deny","ports":[{{"port":81}}]}}]}}}}"#
        )
    };
    let of = |name: &str, from: &str, part: &str| {
        let mut engine = Engine::new(Settings {
            node_name: "n1".into(),
            source: Source::Endpoints,
            unknown_pod: UnknownPod::Open,
            ..Settings::default()
        });
        engine.set_cluster(&cluster(&[CLUSTER, part]));
        engine.add_endpoint(Slot(1), &PodName::new("x", name), "", &["192.168.1.9".parse().unwrap()]);
        image_allows(engine.image(), Slot(1), Direction::Ingress, from.parse().unwrap(), 6, 81)
    };
    let namespaced = |selector: &str| part("PolicyEndpoint", r#"{"name":"p-1","namespace":"x"}"#, selector);
    let by_label = namespaced(r#""podSelector":{"matchLabels":{"pod":"a"}}"#);
    assert!(!of("a", "192.168.1.2", &by_label) && of("a", "192.168.1.3", &by_label));
    assert!(of("b", "192.168.1.2", &by_label), "the selector is of others");
    assert!(!of("b", "192.168.1.2", &namespaced(r#""podSelector":{}"#)), "all pods of the namespace");
    assert!(of("a", "192.168.1.2", &namespaced(r#""podSelector":null"#)), "no selector");
    let clusterwide = |subject: &str| part("ClusterPolicyEndpoint", r#"{"name":"p-1"}"#, subject);
    let by_label = clusterwide(r#""subject":{"pods":{"namespaceSelector":{},"podSelector":{"matchLabels":{"pod":"a"}}}}"#);
    assert!(!of("a", "192.168.1.3", &by_label) && of("a", "192.168.1.2", &by_label));
    assert!(of("b", "192.168.1.3", &by_label));
}

fn passes(engine: &Engine, direction: Direction, peer: &str, port: u16) -> bool {
    image_allows(engine.image(), Slot(1), direction, peer.parse().unwrap(), 6, port)
}

/// A node's engine with x/a in slot 1.
fn with_a(settings: Settings, texts: &[&str]) -> Engine {
    let mut engine = Engine::new(Settings { node_name: "n1".into(), ..settings });
    engine.set_cluster(&cluster(texts));
    engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
    engine
}

const TO_PODS: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"e","namespace":"x"},
    "spec":{"podSelector":{"matchLabels":{"pod":"a"}},"policyTypes":["Egress"],"egress":[{"to":[{"namespaceSelector":{}}]}]}}"#;

/// Who may write pods may write their annotations.
#[test]
fn an_annotation_takes_nothing_from_others_and_gives_no_address_to_a_pod_that_has_one() {
    let claims = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"d","namespace":"x","labels":{"pod":"d"},"creationTimestamp":"2026-01-01T00:00:00Z",
        "annotations":{"vpc.amazonaws.com/pod-ips":"203.0.113.7, 192.168.1.2,10.0.0.2"}},"spec":{"nodeName":"n2"},"status":{"podIP":"192.168.1.9"}}"#;
    let engine = with_a(Settings::default(), &[CLUSTER, POLICY, TO_PODS, claims]);
    assert!(!passes(&engine, Direction::Egress, "203.0.113.7", 443), "nobody's");
    assert!(!passes(&engine, Direction::Egress, "10.0.0.2", 443), "a node's");
    assert!(passes(&engine, Direction::Egress, "192.168.1.9", 443), "what its status says");
    assert!(passes(&engine, Direction::Ingress, "192.168.1.2", 80), "another pod's");
    assert_eq!(engine.pod_at("192.168.1.2".parse().unwrap()), Some(PodName::new("x", "b")));
}

/// ANNOTATE_POD_IP: other nodes know a pod before its kubelet has told its address.
#[test]
fn an_annotation_counts_until_the_status_comes_where_it_is_asked_for_and_nobody_else_has_the_address() {
    let pod = |name: &str, node: &str, annotated: &str, status: &str| {
        format!(
            r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}","namespace":"x","labels":{{"pod":"b"}},"annotations":{{"vpc.amazonaws.com/pod-ips":"{annotated}"}}}},
            "spec":{{"nodeName":"{node}"}},"status":{{{status}}}}}"#
        )
    };
    let nodes =
        r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n2"},"status":{"addresses":[{"type":"InternalIP","address":"10.0.0.2"}]}}"#;
    let asked = || Settings { annotated_pods: true, ..Settings::default() };
    let from = |settings: Settings, pods: &str, peer: &str| {
        passes(&with_a(settings, &[CLUSTER, POLICY, nodes, pods]), Direction::Ingress, peer, 80)
    };
    let early = pod("early", "n2", "192.168.1.7, 192.168.1.8", "");
    assert!(from(asked(), &early, "192.168.1.7") && !from(asked(), &early, "192.168.1.8"), "one a family");
    assert!(!from(Settings::default(), &early, "192.168.1.7"), "nobody writes it");
    assert!(!from(asked(), &pod("early", "", "192.168.1.7", ""), "192.168.1.7"), "bound to no node");
    for others in ["192.168.1.3", "10.0.0.2", "169.254.169.254"] {
        assert!(!from(asked(), &pod("early", "n2", others, ""), others), "{others}");
    }
    let two = pod("early", "n2", "192.168.1.7", "") + "\n" + &pod("late", "n2", "192.168.1.7", "");
    assert!(!from(asked(), &two, "192.168.1.7"), "whose it is is not known");
    let mut engine = with_a(asked(), &[CLUSTER, POLICY, &early]);
    engine.set_cluster(&cluster(&[CLUSTER, POLICY, &pod("early", "n2", "192.168.1.7", r#""podIP":"192.168.1.8""#)]));
    assert!(passes(&engine, Direction::Ingress, "192.168.1.8", 80) && !passes(&engine, Direction::Ingress, "192.168.1.7", 80));
}

/// A service of namespace y with a backend.
fn service(name: &str, metadata: &str, spec: &str, backend: &str) -> String {
    format!(
        r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}","namespace":"y"{metadata}}},"spec":{{{spec},"ports":[{{"port":80}}]}}}}
{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"{name}-1","namespace":"y","labels":{{"kubernetes.io/service-name":"{name}"}}}},"addressType":"IPv4","endpoints":[{{"addresses":["{backend}"]}}],"ports":[{{"port":80}}]}}"#
    )
}

const TO_B: &str = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"e","namespace":"x"},
    "spec":{"podSelector":{"matchLabels":{"pod":"a"}},"policyTypes":["Egress"],"egress":[{"to":[{"podSelector":{"matchLabels":{"pod":"b"}}},{"ipBlock":{"cidr":"198.51.100.0/24"}}]}]}}"#;

#[test]
fn a_service_that_kube_proxy_passes_over_opens_and_closes_nothing() {
    let with = |metadata: &str, spec: &str| {
        let opens = service("s", metadata, &format!(r#"{spec},"externalIPs":["203.0.113.7"]"#), "192.168.1.2");
        let closes = service("t", metadata, &format!(r#"{spec},"externalIPs":["198.51.100.1"]"#), "192.168.1.3");
        let engine = with_a(Settings::default(), &[CLUSTER, TO_B, &opens, &closes]);
        (passes(&engine, Direction::Egress, "203.0.113.7", 80), passes(&engine, Direction::Egress, "198.51.100.1", 80))
    };
    let cluster_ip = r#""clusterIP":"172.20.0.9""#;
    assert_eq!(with("", cluster_ip), (true, false), "the backend decides");
    for (metadata, spec) in [
        ("", r#""clusterIP":"None""#),
        ("", r#""type":"ExternalName","externalName":"example.com""#),
        (r#","labels":{"service.kubernetes.io/service-proxy-name":"other"}"#, cluster_ip),
        (r#","labels":{"service.kubernetes.io/headless":""}"#, cluster_ip),
    ] {
        assert_eq!(with(metadata, spec), (false, true), "{metadata} {spec}");
    }
}

/// The rest of what a service may write down as its own.
#[test]
fn an_external_address_takes_nothing_from_rules_services_and_pods() {
    let denies = r#"{"apiVersion":"policy.networking.k8s.io/v1alpha2","kind":"ClusterNetworkPolicy","metadata":{"name":"c"},
        "spec":{"tier":"Admin","subject":{"namespaces":{}},"egress":[{"action":"Deny","to":[{"networks":["203.0.113.0/24"]}]}]}}"#;
    let dns = service("dns", "", r#""clusterIP":"172.20.0.10""#, "192.168.1.2");
    let to = |external: &str, backend: &str, texts: &[&str], peer: &str| {
        let other = service("s", "", &format!(r#""clusterIP":"172.20.0.9","externalIPs":["{external}"]"#), backend);
        let mut all = vec![CLUSTER, TO_B, dns.as_str(), other.as_str()];
        all.extend(texts);
        passes(&with_a(Settings::default(), &all), Direction::Egress, peer, 80)
    };
    assert!(to("203.0.113.7", "192.168.1.2", &[], "203.0.113.7"), "the backend decides");
    assert!(!to("203.0.113.7", "192.168.1.2", &[denies], "203.0.113.7"), "a rule denies the address");
    assert!(!to("203.0.113.7", "10.0.0.1", &[denies], "203.0.113.7"), "whatever is behind it");
    assert!(to("172.20.0.10", "192.168.1.3", &[], "172.20.0.10"), "another service's");
    assert!(to("192.168.1.2", "192.168.1.3", &[], "192.168.1.2"), "a pod's");
    assert!(to("192.168.1.2", "192.168.1.3", &[], "172.20.0.10"), "a backend's of another service");
}

/// AWS's strict mode: a pod needs a policy to have network.
#[test]
fn in_strict_mode_a_pod_that_no_policy_selects_is_closed() {
    let strict = |source| Settings { source, unselected_pod: UnselectedPod::Closed, ..Settings::default() };
    let open = |engine: &Engine| {
        [(Direction::Ingress, "192.168.1.2"), (Direction::Ingress, "192.168.1.3"), (Direction::Egress, "192.168.1.3")]
            .map(|(direction, peer)| passes(engine, direction, peer, 80))
    };
    let part = r#"{"apiVersion":"networking.k8s.aws/v1alpha1","kind":"PolicyEndpoint","metadata":{"name":"p-1","namespace":"x"},
        "spec":{"policyRef":{"name":"p","namespace":"x"},"podIsolation":["Ingress"],"podSelectorEndpoints":[{"name":"a","namespace":"x"}],
        "ingress":[{"cidr":"192.168.1.2","ports":[{"port":80}]}]}}"#;
    for (source, policy) in [(Source::Policies, POLICY), (Source::Endpoints, part)] {
        let mut engine = with_a(strict(source), &[CLUSTER]);
        let revision = |engine: &Engine| engine.image().endpoints[&Slot(1)].revision;
        assert_eq!(engine.can_judge(&PodName::new("x", "a"), ""), Ok(()), "it starts");
        assert_eq!(open(&engine), [false; 3], "{source:?}: no policy");
        assert!(passes(&engine, Direction::Ingress, "10.0.0.1", 80) && passes(&engine, Direction::Egress, "10.0.0.1", 80), "the own node");
        engine.set_cluster(&cluster(&[CLUSTER, policy]));
        assert_eq!(open(&engine), [true, false, true], "{source:?}: as the policy says, and what it does not isolate is open");
        let before = revision(&engine);
        engine.set_cluster(&cluster(&[CLUSTER]));
        assert_eq!(open(&engine), [false; 3], "{source:?}: its last policy is gone");
        assert!(revision(&engine) > before, "what is open is judged anew");
        engine.set_cluster(&cluster(&[&CLUSTER.replace(r#""labels":{"pod":"a"}"#, r#""labels":{"pod":"z"}"#), POLICY]));
        assert_eq!(open(&engine), [false; 3], "{source:?}: the policy is of others");
    }
}

#[test]
fn in_strict_mode_policies_of_the_cluster_come_before_what_is_closed_by_default() {
    let of = |tier: &str| {
        format!(
            r#"{{"apiVersion":"policy.networking.k8s.io/v1alpha2","kind":"ClusterNetworkPolicy","metadata":{{"name":"c"}},"spec":{{"tier":"{tier}","subject":{{"namespaces":{{}}}},
            "ingress":[{{"action":"Accept","from":[{{"pods":{{"podSelector":{{"matchLabels":{{"pod":"c"}}}}}}}}]}},{{"action":"Pass","from":[{{"namespaces":{{}}}}]}}]}}}}"#
        )
    };
    let strict = || Settings { unselected_pod: UnselectedPod::Closed, ..Settings::default() };
    for tier in ["Admin", "Baseline"] {
        let policy = of(tier);
        let engine = with_a(strict(), &[CLUSTER, &policy]);
        assert!(passes(&engine, Direction::Ingress, "192.168.1.3", 80), "{tier}: accepted");
        assert!(!passes(&engine, Direction::Ingress, "192.168.1.2", 80), "{tier}: passed on to nothing");
        assert!(!passes(&engine, Direction::Egress, "192.168.1.3", 80), "{tier}: the other direction");
        let engine = with_a(strict(), &[CLUSTER, &policy, POLICY]);
        assert_eq!(passes(&engine, Direction::Ingress, "192.168.1.3", 81), tier == "Admin");
        assert!(passes(&engine, Direction::Ingress, "192.168.1.2", 80) && passes(&engine, Direction::Egress, "192.168.1.3", 80), "{tier}");
    }
}

/// AWS's controller is behind: nobody knows whether a policy comes.
#[test]
fn in_strict_mode_a_pod_that_no_resolved_policy_speaks_of_starts_closed() {
    let part = r#"{"apiVersion":"networking.k8s.aws/v1alpha1","kind":"PolicyEndpoint","metadata":{"name":"p-1","namespace":"x"},
        "spec":{"policyRef":{"name":"p","namespace":"x"},"podIsolation":["Ingress"],"podSelectorEndpoints":[{"name":"a","namespace":"x"}]}}"#;
    let judged = |name: &str, unknown_pod| {
        let strict = Settings { source: Source::Endpoints, unknown_pod, unselected_pod: UnselectedPod::Closed, ..Settings::default() };
        let mut engine = Engine::new(Settings { node_name: "n1".into(), ..strict });
        engine.set_cluster(&cluster(&[CLUSTER, part]));
        let name = PodName::new("x", name);
        engine.add_endpoint(Slot(1), &name, "", &["192.168.1.1".parse().unwrap()]);
        (engine.can_judge(&name, ""), passes(&engine, Direction::Egress, "192.168.1.3", 80))
    };
    for unknown_pod in [UnknownPod::Closed, UnknownPod::Open] {
        assert_eq!(judged("a", unknown_pod), (Ok(()), true), "what the policy does not isolate");
        assert_eq!(judged("b", unknown_pod), (Ok(()), false));
    }
}

/// Whoever answers the pods of one namespace may lie to them, and to nobody else.
#[test]
fn a_name_counts_for_pods_of_the_namespace_that_has_learnt_it() {
    let policy = |namespace: &str| {
        format!(
            r#"{{"apiVersion":"networking.k8s.aws/v1alpha1","kind":"ApplicationNetworkPolicy","metadata":{{"name":"p","namespace":"{namespace}"}},
            "spec":{{"podSelector":{{}},"policyTypes":["Egress"],"egress":[{{"to":[{{"domainNames":["www.example.com"]}}]}}]}}}}"#
        )
    };
    let of_cluster = r#"{"apiVersion":"policy.networking.k8s.io/v1alpha2","kind":"ClusterNetworkPolicy","metadata":{"name":"c"},"spec":{"tier":"Admin","subject":{"namespaces":{}},
        "egress":[{"action":"Accept","to":[{"domainNames":["www.example.com"]}]},{"action":"Deny","to":[{"networks":["0.0.0.0/0"]}]}]}}"#;
    let y = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"y"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"e","namespace":"y"},"spec":{"nodeName":"n1"},"status":{"podIP":"192.168.1.5"}}
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"f","namespace":"y"},"spec":{"nodeName":"n1"},"status":{"podIP":"192.168.1.6"}}"#;
    let address: IpAddr = "203.0.113.7".parse().unwrap();
    for policies in [vec![policy("x"), policy("y")], vec![of_cluster.to_owned()]] {
        let mut texts = vec![CLUSTER, y];
        texts.extend(policies.iter().map(String::as_str));
        let mut engine = with_a(Settings::default(), &texts);
        engine.add_endpoint(Slot(2), &PodName::new("y", "e"), "", &["192.168.1.5".parse().unwrap()]);
        engine.add_endpoint(Slot(3), &PodName::new("y", "f"), "", &["192.168.1.6".parse().unwrap()]);
        let open = |engine: &Engine| [1, 2, 3].map(|slot| image_allows(engine.image(), Slot(slot), Direction::Egress, address, 6, 443));
        let answer = Answer { name: "www.example.com".to_owned(), address, ttl: 100 };
        let (_, result) = engine.learn(Slot(2), std::slice::from_ref(&answer), 1_000);
        assert_eq!((result, open(&engine)), (Ok(()), [false, true, true]));
        let (_, result) = engine.learn(Slot(1), &[answer], 1_000);
        assert_eq!((result, open(&engine)), (Ok(()), [true, true, true]));
        engine.forget(2_000, |_| false);
        assert_eq!(open(&engine), [false; 3]);
    }
}

/// In namespace y, so that pods of x have nothing of it.
fn large(name: &str, rules: &[String]) -> String {
    format!(
        r#"{{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{{"name":"{name}","namespace":"y"}},"spec":{{"podSelector":{{"matchLabels":{{"pod":"{name}"}}}},"policyTypes":["Egress"],"egress":[{}]}}}}"#,
        rules.join(",")
    )
}

/// Who may write policies for one namespace does not take the agent from others.
#[test]
fn policies_that_come_to_too_much_close_their_own_pods_and_leave_others_alone() {
    let few = || Settings { most_verdicts: 65_536, ..Settings::default() };
    let pods = ["large", "broad"].map(|name| {
        format!(r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}","namespace":"y","labels":{{"pod":"{name}"}}}},"spec":{{"nodeName":"n1"}}}}"#)
    });
    let ports = |count: u32| (0..count).map(|n| format!(r#"{{"port":{}}}"#, 1 + 2 * n)).collect::<Vec<_>>().join(",");
    let host = |n: u32| format!("10.{}.{}.{}/32", n >> 16, n >> 8 & 255, n & 255);
    let one = |n: u32| format!(r#"{{"to":[{{"ipBlock":{{"cidr":"{}"}}}}],"ports":[{{"port":{}}}]}}"#, host(n), 2 * (n % 2_000));
    let anywhere = |count: u32| format!(r#"{{"to":[{{"ipBlock":{{"cidr":"0.0.0.0/0"}}}}],"ports":[{}]}}"#, ports(count));
    let product: Vec<String> = std::iter::once(anywhere(2_000)).chain((0..1_000).map(one)).collect();
    let many: Vec<String> = (0..2_600).map(one).collect();
    let classes = |n: u32| {
        format!(
            r#"{{"to":[{{"ipBlock":{{"cidr":"0.0.0.0/0"}}}},{{"ipBlock":{{"cidr":"{}"}}}}],"ports":[{{"port":{}}}]}}"#,
            host(n),
            1 + n % 2
        )
    };
    let classes: Vec<String> = (0..1_600).map(classes).collect();
    let beside = r#"{"to":[{"ipBlock":{"cidr":"203.0.113.0/24"}}],"ports":[{"port":7000}]}"#;
    let broad = large("broad", &[anywhere(450), beside.to_owned()]);
    for (about, rules) in [("ports by peers", product), ("peers that others have ports for", many), ("peers by peers", classes)] {
        let all = [CLUSTER, POLICY, &pods[0], &pods[1], &broad];
        let mut engine = with_a(few(), &all);
        engine.add_endpoint(Slot(2), &PodName::new("y", "large"), "", &["192.168.1.7".parse().unwrap()]);
        engine.add_endpoint(Slot(3), &PodName::new("y", "broad"), "", &["192.168.1.8".parse().unwrap()]);
        let to = |engine: &Engine, slot, peer: &str, port| {
            image_allows(engine.image(), Slot(slot), Direction::Egress, peer.parse().unwrap(), 6, port)
        };
        assert!(to(&engine, 2, "10.0.0.9", 18) && engine.problems().is_empty(), "{about}");
        let policy = large("large", &rules);
        let ops = engine.set_cluster(&cluster(&[&all[..], &[&policy]].concat()));
        assert!(ops.len() < 10_000, "{about}: {} operations", ops.len());
        assert!(!to(&engine, 2, "10.0.0.9", 18) && !to(&engine, 2, "10.0.0.9", 17), "{about}: closed");
        let problems = engine.problems();
        let [problem] = problems.as_slice() else { panic!("{about}: {problems:?}") };
        assert!(problem.to_string().contains("NetworkPolicy y/large: spec.egress: "), "{about}: {problem}");
        assert!(
            passes(&engine, Direction::Ingress, "192.168.1.2", 80) && !passes(&engine, Direction::Ingress, "192.168.1.3", 80),
            "{about}"
        );
        assert!(to(&engine, 3, "10.0.0.9", 17) && !to(&engine, 3, "10.0.0.9", 18), "{about}: another large one");
        assert!(engine.set_cluster(&cluster(&[&all[..], &[&policy]].concat())).is_empty(), "{about}: it stays so");
        // An agent that finds everything at once.
        let mut next = Engine::new(Settings { node_name: "n1".into(), ..few() });
        next.add_endpoint(Slot(2), &PodName::new("y", "large"), "", &["192.168.1.7".parse().unwrap()]);
        next.add_endpoint(Slot(3), &PodName::new("y", "broad"), "", &["192.168.1.8".parse().unwrap()]);
        next.set_cluster(&cluster(&[&all[..], &[&policy]].concat()));
        assert!(to(&next, 3, "10.0.0.9", 17) && !to(&next, 3, "10.0.0.9", 18) && to(&next, 3, "203.0.113.9", 7_000), "{about}");
        assert!(!to(&next, 2, "10.0.0.9", 18) && next.problems() == problems, "{about}");
        // One that finds the pod last: no policy has changed.
        let mut last = with_a(few(), &[&all[..], &[&policy]].concat());
        assert_eq!(last.closed_as_too_large().count(), 0, "{about}");
        last.add_endpoint(Slot(2), &PodName::new("y", "large"), "", &["192.168.1.7".parse().unwrap()]);
        last.add_endpoint(Slot(3), &PodName::new("y", "broad"), "", &["192.168.1.8".parse().unwrap()]);
        assert_eq!(last.closed_as_too_large().collect::<Vec<_>>(), [Slot(2)], "{about}");
        engine.set_cluster(&cluster(&[&all[..], &[&large("large", &rules[rules.len() - 10..])]].concat()));
        assert!(engine.problems().is_empty() && !to(&engine, 2, "10.9.9.9", 6_000), "{about}: mended");
    }
}

const BY_NAMESPACE: &str = r#"{"apiVersion":"policy.networking.k8s.io/v1beta1","kind":"ClusterNetworkPolicy","metadata":{"name":"c"},
    "spec":{"tier":"Admin","subject":{"namespaces":{"matchLabels":{"kubernetes.io/metadata.name":"x"}}},
    "ingress":[{"action":"Deny","from":[{"pods":{"namespaceSelector":{},"podSelector":{"matchLabels":{"pod":"c"}}}}]}]}}"#;

/// After an outage of the API server kinds come one after the other.
#[test]
fn a_pod_is_judged_when_what_selects_it_is_known() {
    let namespace = CLUSTER.lines().find(|line| line.contains(r#""Namespace""#)).unwrap();
    let without = CLUSTER.replace(namespace, "");
    let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
    let judged = |engine: &mut Engine, cluster: Arc<ClusterState>| {
        engine.set_cluster(&cluster);
        engine.can_judge(&PodName::new("x", "a"), "")
    };
    assert_eq!(engine.can_judge(&PodName::new("x", "a"), ""), Err(Missing::Cluster));
    assert_eq!(judged(&mut engine, cluster(&[namespace])), Ok(()), "no policy could concern it");
    assert_eq!(judged(&mut engine, cluster(&[namespace, POLICY])), Err(Missing::Pod));
    assert_eq!(judged(&mut engine, cluster(&[&without, POLICY])), Ok(()), "by its namespace's name");
    assert_eq!(judged(&mut engine, cluster(&[&without, BY_NAMESPACE])), Err(Missing::Namespace));
    assert_eq!(judged(&mut engine, cluster(&[CLUSTER, BY_NAMESPACE])), Ok(()));
    for (kind, strict) in
        [(Kind::NetworkPolicy, Err(Missing::Policies(Kind::NetworkPolicy))), (Kind::PolicyEndpoint, Ok(())), (Kind::Service, Ok(()))]
    {
        let stale = Arc::new(ClusterState { stale: [kind].into(), ..(*cluster(&[CLUSTER])).clone() });
        engine.set_unknown_pod(UnknownPod::Closed);
        assert_eq!(judged(&mut engine, Arc::clone(&stale)), strict);
        engine.set_unknown_pod(UnknownPod::Open);
        assert_eq!(judged(&mut engine, stale), Ok(()), "{kind:?}");
    }
}

/// Who may annotate a namespace often may not write policies for the cluster.
#[test]
fn audit_lifts_isolation_and_no_denial_by_a_policy_of_the_cluster() {
    let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
    let audited = CLUSTER.replace(
        r#"{"name":"x"}"#,
        r#"{"name":"x","labels":{"kubernetes.io/metadata.name":"x"},"annotations":{"policy.stanchion.dev/audit":"true"}}"#,
    );
    engine.set_cluster(&cluster(&[&audited, POLICY, BY_NAMESPACE]));
    engine.add_endpoint(Slot(1), &PodName::new("x", "a"), "", &["192.168.1.1".parse().unwrap()]);
    let from = |peer: &str, port| image_allows(engine.image(), Slot(1), Direction::Ingress, peer.parse().unwrap(), 6, port);
    assert!(from("192.168.1.2", 80), "allowed");
    assert!(from("192.168.1.2", 81), "the NetworkPolicy's isolation is only told");
    assert!(!from("192.168.1.3", 80), "the Admin tier denies");
    // What is let through has flows, which the Admin tier's later denial ends.
    let revision = |engine: &Engine| engine.image().endpoints[&Slot(1)].revision;
    let before = revision(&engine);
    let allows_more = POLICY.replace(r#""port":80"#, r#""port":80,"endPort":90"#);
    engine.set_cluster(&cluster(&[&audited, &allows_more, BY_NAMESPACE]));
    engine.set_cluster(&cluster(&[&audited, &allows_more, &BY_NAMESPACE.replace(r#""pod":"c""#, r#""pod":"b""#)]));
    let from = |peer: &str, port| image_allows(engine.image(), Slot(1), Direction::Ingress, peer.parse().unwrap(), 6, port);
    assert!(!from("192.168.1.2", 81) && revision(&engine) > before);
    // Behind a service, one backend that only isolation denies and one that the Admin tier does.
    let egress = BY_NAMESPACE.replace("ingress", "egress").replace("from", "to");
    let isolates = POLICY.replace(r#""ingress":"#, r#""policyTypes":["Egress"],"ingress":"#);
    let service = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"x"},"spec":{"clusterIP":"172.20.0.9","ports":[{"port":80}]}}"#;
    for (backends, passes) in [(r#""192.168.1.2""#, true), (r#""192.168.1.3""#, false), (r#""192.168.1.2","192.168.1.3""#, false)] {
        let slice = format!(
            r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"s-1","namespace":"x","labels":{{"kubernetes.io/service-name":"s"}}}},
            "addressType":"IPv4","endpoints":[{{"addresses":[{backends}]}}],"ports":[{{"port":8080}}]}}"#
        );
        engine.set_cluster(&cluster(&[&audited, &isolates, &egress, service, &slice]));
        let found = image_allows(engine.image(), Slot(1), Direction::Egress, "172.20.0.9".parse().unwrap(), 6, 80);
        assert_eq!(found, passes, "{backends}");
    }
}

#[test]
fn one_policy_one_pod() {
    let mut engine = Engine::new(Settings { node_name: "n1".into(), ..Settings::default() });
    let name = PodName::new("x", "a");
    let own: IpAddr = "192.168.1.1".parse().unwrap();
    let (slot, from) = (Slot(1), |engine: &Engine, peer: &str, port| {
        image_allows(engine.image(), Slot(1), Direction::Ingress, peer.parse().unwrap(), 6, port)
    });
    assert!(!engine.knows(&name, ""));
    let ops = engine.add_endpoint(slot, &name, "", &[own]);
    assert!(matches!(ops.as_slice(), [MapOp::SetEndpoint(Slot(1), image)] if image.ingress.is_some()), "closed until known");
    engine.set_cluster(&cluster(&[CLUSTER]));
    assert!(engine.knows(&name, ""));
    assert!(from(&engine, "192.168.1.3", 80));
    let ops = engine.set_cluster(&cluster(&[CLUSTER, POLICY]));
    assert!(from(&engine, "192.168.1.2", 80));
    assert!(!from(&engine, "192.168.1.2", 81));
    assert!(!from(&engine, "192.168.1.3", 80));
    assert!(from(&engine, "10.0.0.1", 81), "the own node");
    assert!(matches!(ops.last(), Some(MapOp::SetEndpoint(..))), "entries first, then the flip: {ops:?}");
    assert!(engine.set_cluster(&cluster(&[CLUSTER, POLICY])).is_empty());
    assert!(!engine.remove_endpoint(slot).is_empty());
    let node = MapImage { node_addresses: vec!["10.0.0.1".parse().unwrap()], ..MapImage::default() };
    assert_eq!(*engine.image(), node, "nothing is left but the node");
}
