//! The scenes, in order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use stanchion_lab::agent::Agent;
use stanchion_lab::cloudwatch::{self, Delivered};
use stanchion_lab::container_log::Output;
use stanchion_lab::netns::{Netns, names};
use stanchion_lab::node::Node;
use stanchion_lab::pod::{Pod, PodSpec};
use stanchion_lab::probe::{Answer, Conversation, End, Matrix, PATIENCE, Protocol};
use stanchion_lab::vpc::EXAMPLE_HOST;
use stanchion_lab::wait::wait_for;
use stanchion_lab::{Vpc, leftovers};

use crate::story::{Story, table};

const SOON: Duration = Duration::from_secs(20);

/// What the pool should hold: little, so that it is seen to grow. Logs and metrics at a pace for an audience.
const SETTINGS: [(&str, &str); 4] = [
    ("WARM_IP_TARGET", "1"),
    ("MINIMUM_IP_TARGET", "3"),
    ("STANCHION_METRICS_INTERVAL_SECONDS", "2"),
    ("STANCHION_LOG_FLUSH_SECONDS", "0.2"),
];

const POLICY_FILE: &str = "policy-db.yaml";
const POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: db-only-for-web}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - podSelector: {matchLabels: {app: web}}
    ports:
    - {protocol: TCP, port: 80}
";

/// Everything on the stage. Agents and pods go before the VPC that they live in.
pub(crate) struct Stage {
    agents: BTreeMap<String, Agent>,
    pods: BTreeMap<String, (Node, Pod)>,
    nodes: [Node; 2],
    vpc: Vpc,
}

// === building up ===

impl Stage {
    /// The VPC with its nodes, nothing of ours in it yet.
    pub(crate) async fn set(story: &mut Story) -> anyhow::Result<Self> {
        story.scene(
            "A VPC on this machine",
            "Every box is a network namespace and every line a real wire. The router behaves as EC2 does: it drops what leaves an \
             ENI with a source address that is not assigned to that ENI. EC2, the metadata service and CloudWatch Logs are strict \
             fakes on those wires; agent, CNI plugin, eBPF programs and kernel are the real ones.",
        );
        let (vpc, nodes) = story
            .check("router, internet and two nodes are up", async {
                let mut vpc = Vpc::builder().start().await?;
                let nodes = [vpc.node("node1", "t3.small").await?, vpc.node("node2", "m5.large").await?];
                Ok((vpc, nodes))
            })
            .await?;
        story.show(topology(&nodes));
        Ok(Self { agents: BTreeMap::new(), pods: BTreeMap::new(), nodes, vpc })
    }

    /// The whole story up to the point where everything runs.
    pub(crate) async fn play(&mut self, story: &mut Story, keep: bool) -> anyhow::Result<()> {
        self.agents_start(story).await?;
        self.pods_start(story).await?;
        self.everybody_talks(story).await?;
        self.policy_applies(story).await?;
        self.logs_and_metrics_arrive(story).await?;
        self.agent_is_killed(story).await?;
        if keep {
            self.look_around().await?;
        }
        self.pods_end(story).await
    }

    async fn agents_start(&mut self, story: &mut Story) -> anyhow::Result<()> {
        story.scene(
            "The agent starts on each node",
            "It learns from the metadata service who it is, looks up how many ENIs and addresses its instance type may have, and asks \
             EC2 for a small warm pool of addresses (WARM_IP_TARGET=1, MINIMUM_IP_TARGET=3), so that a pod need not wait for EC2.",
        );
        for node in &self.nodes {
            let agent = story
                .check(&format!("the agent on {} is ready to connect pods", node.name()), async {
                    let mut agent = node.start_agent(&SETTINGS)?;
                    node.ready(&mut agent, SOON).await?;
                    Ok(agent)
                })
                .await?;
            self.agents.insert(node.name().to_owned(), agent);
        }
        let node = &self.nodes[0];
        story.note(format!("{}# stanchion enis", node.name()));
        story.show(node.cli(&["enis"])?);
        Ok(())
    }

    async fn pods_start(&mut self, story: &mut Story) -> anyhow::Result<()> {
        story.scene(
            "Pods start",
            "For each, the real CNI plugin runs in the node's namespace, as containerd would run it. A t3.small's ENI holds three pod \
             addresses, so the fourth pod on node1 needs a second ENI: the agent creates and attaches it, a real interface appears, and \
             that pod's packets must leave by it, or the router drops them.",
        );
        for namespace in ["shop", "ops"] {
            self.vpc.manifests().namespace(namespace, &[("team", namespace)])?;
        }
        let [one, two] = self.nodes.clone();
        for (node, namespace, name) in [
            (&one, "shop", "web-1"),
            (&one, "shop", "db-1"),
            (&one, "shop", "cart-1"),
            (&one, "shop", "web-2"),
            (&one, "ops", "monitor-1"),
            (&two, "shop", "web-3"),
            (&two, "ops", "scanner-1"),
        ] {
            self.start_pod(story, node, PodSpec::new(namespace, name)).await?;
        }
        let mut rows = Vec::new();
        let mut on_secondary = Vec::new();
        for (name, (node, pod)) in &self.pods {
            let eni = self.vpc.cloud().owner_of(pod.address()).with_context(|| format!("{} is nobody's in EC2", pod.address()))?;
            let device = self.vpc.cloud().eni(&eni).and_then(|eni| eni.attachment).map_or(0, |attachment| attachment.device_index);
            if device > 0 {
                on_secondary.push(name.clone());
            }
            let took = format!("{:.0} ms", pod.add_took().as_secs_f64() * 1e3);
            let place = format!("eth{device} ({})", if device == 0 { "primary ENI" } else { "secondary ENI" });
            rows.push(vec![name.clone(), node.name().to_owned(), pod.address().to_string(), place, took]);
        }
        story.show(table(&["pod", "node", "address", "leaves by", "CNI ADD took"], &rows));
        let addresses: BTreeSet<IpAddr> = self.pods.values().map(|(_, pod)| pod.address()).collect();
        story.holds("every pod has an address of its own", addresses.len() == self.pods.len(), format!("{rows:?}")).await?;
        story.holds("some pods' addresses are on a secondary ENI", !on_secondary.is_empty(), "all are on the primary").await
    }

    async fn start_pod(&mut self, story: &mut Story, node: &Node, spec: PodSpec) -> anyhow::Result<()> {
        let what = format!("{}/{} starts on {}", spec.namespace, spec.name, node.name());
        let pod = story.check(&what, node.add_pod(spec)).await?;
        self.pods.insert(pod.name(), (node.clone(), pod));
        Ok(())
    }

    async fn everybody_talks(&mut self, story: &mut Story) -> anyhow::Result<()> {
        story.scene(
            "Everybody talks to everybody",
            "No policy yet: each pod opens a TCP connection to each other one, across nodes through the router. Out to the internet \
             they go as their node's public address: only the primary ENI's address has one, so the agent translates.",
        );
        let ends: Vec<End> = self.pods.values().map(|(_, pod)| pod.end()).collect();
        let matrix = Matrix::probe(&ends, Protocol::Tcp, 80, PATIENCE).await?;
        story.matrix(&matrix);
        let wrong = matrix.differences(|_, _| true);
        story.holds("every connection works", wrong.is_empty(), wrong.join(", ")).await?;
        for (node, pod) in self.pods.values() {
            let answer = pod.probe(Protocol::Tcp, EXAMPLE_HOST.into(), 80).await?;
            let what = format!("{} reaches the internet as {}", pod.name(), node.public());
            story.holds(&what, answer == Answer::Reached { seen_as: node.public() }, format!("{answer:?}")).await?;
        }
        let refused = self.vpc.refused()?;
        story.holds("the router saw no packet with a wrong source", refused.wrong_source == 0, format!("{refused:?}")).await
    }

    async fn policy_applies(&mut self, story: &mut Story) -> anyhow::Result<()> {
        story.scene(
            "A NetworkPolicy",
            "Only web pods may reach the database, and only on TCP port 80. The file is put where the agents read the cluster's state; \
             nothing is restarted.",
        );
        story.show(POLICY);
        self.vpc.manifests().apply(POLICY_FILE, POLICY)?;
        let ends: Vec<End> = self.pods.values().map(|(_, pod)| pod.end()).collect();
        let matrix = story
            .check("the eBPF programs enforce it", async {
                wait_for("the matrix that the policy asks for", SOON, || async {
                    let matrix = Matrix::probe(&ends, Protocol::Tcp, 80, PATIENCE).await?;
                    let wrong = matrix.differences(allowed);
                    ensure!(wrong.is_empty(), "{}", wrong.join(", "));
                    Ok(matrix)
                })
                .await
            })
            .await?;
        story.matrix(&matrix);
        let db = self.address("shop/db-1")?;
        let web = &self.pod("shop/web-3")?;
        let answer = web.probe(Protocol::Udp, db, 80).await?;
        story.holds("UDP from a web pod is blocked: only TCP is listed", answer == Answer::Silent, format!("{answer:?}")).await?;
        for (from, word) in [("ops/scanner-1", "denied"), ("shop/web-3", "allowed")] {
            let args = ["policy", "explain", "--from", from, "--to", "shop/db-1", "--port", "80"];
            let manifests = self.vpc.manifests().dir().display().to_string();
            let text = self.nodes[0].cli(&[&args[..], &["--manifests", &manifests]].concat())?;
            story.note(format!("node1# stanchion {}", args.join(" ")));
            story.show(&text);
            story.holds(&format!("the explanation says {word}"), text.to_lowercase().contains(word), &text).await?;
        }
        let node = self.nodes[0].clone();
        self.start_pod(story, &node, PodSpec::new("shop", "db-2")).await?;
        let scanner = self.pod("ops/scanner-1")?.probe(Protocol::Tcp, self.address("shop/db-2")?, 80).await?;
        story.holds("the policy was in force before the new pod's first packet", scanner == Answer::Silent, format!("{scanner:?}")).await?;
        let web = self.pod("shop/web-3")?.probe(Protocol::Tcp, self.address("shop/db-2")?, 80).await?;
        story.holds("and a web pod's first packet gets through", web.reached(), format!("{web:?}")).await
    }
}

// === observing ===

impl Stage {
    async fn logs_and_metrics_arrive(&mut self, story: &mut Story) -> anyhow::Result<()> {
        story.scene(
            "Logs and metrics arrive in CloudWatch",
            "Containers write to files, as containerd does it. The agent follows the files, adds what it knows of the pod, and ships \
             batches. It also writes a Container Insights document of the node and serves Prometheus text on port 61678.",
        );
        for n in 0..20 {
            for name in ["shop/web-1", "shop/web-3"] {
                self.log(name, &format!("{name} request {n}"))?;
            }
        }
        let long = format!("long line {}", "x".repeat(40_000));
        self.log("shop/web-1", &long)?;
        let delivered = story
            .check("every line is found in the log group, each once", async {
                self.delivered(|delivered| {
                    for name in ["shop/web-1", "shop/web-3"] {
                        delivered.exactly_once((0..20).map(|n| format!("{name} request {n}")))?;
                    }
                    delivered.exactly_once([long.clone()])
                })
                .await
            })
            .await?;
        let example = delivered.find("shop/web-3 request 0").context("it was there a moment ago")?;
        story.note(format!("group {}, stream {}", example.group, example.stream));
        story.show(serde_json::to_string_pretty(&example.record)?);
        let pod = example.record["kubernetes"]["pod_name"].as_str().unwrap_or_default();
        story.holds("the record names its pod", pod == "web-3", &example.record).await?;
        let document = story
            .check("a metrics document of each node arrives", async {
                wait_for("Container Insights documents", SOON, || async {
                    let of = |node: &Node| cloudwatch::node_document(self.vpc.cloud(), node.name());
                    of(&self.nodes[1]).with_context(|| format!("none of {}", self.nodes[1].name()))?;
                    of(&self.nodes[0]).with_context(|| format!("none of {}", self.nodes[0].name()))
                })
                .await
            })
            .await?;
        story.show(cloudwatch::numbers(&document));
        let node = self.nodes[0].clone();
        let metrics = story.check("Prometheus text on port 61678 counts this node's ENIs", scrape(node)).await?;
        let interesting = |line: &&str| line.starts_with("awscni_eni_allocated") || line.starts_with("awscni_total_ip_addresses");
        story.show(metrics.lines().filter(interesting).collect::<Vec<_>>().join("\n"));
        Ok(())
    }

    async fn agent_is_killed(&mut self, story: &mut Story) -> anyhow::Result<()> {
        story.scene(
            "The agent is killed",
            "kill -9 on node1's agent, while a web pod on node2 talks to the database on node1. Programs, maps and routes stay in the \
             kernel: the conversation and the policy go on. Meanwhile a container logs and its log is rotated.",
        );
        let db = self.address("shop/db-1")?;
        let talk = Conversation::start(self.pod("shop/web-3")?.netns(), SocketAddr::new(db, 80))?;
        self.agents.get_mut("node1").context("it runs")?.kill()?;
        for n in 0..10 {
            self.log("shop/web-1", &format!("while the agent is dead {n}"))?;
        }
        self.pods.get_mut("shop/web-1").context("it runs")?.1.log.rotate()?;
        for n in 10..20 {
            self.log("shop/web-1", &format!("while the agent is dead {n}"))?;
        }
        let ends: Vec<End> = self.pods.values().map(|(_, pod)| pod.end()).collect();
        story
            .check("without the agent, the same connections work and the same are blocked", async {
                let wrong = Matrix::probe(&ends, Protocol::Tcp, 80, PATIENCE).await?.differences(allowed);
                ensure!(wrong.is_empty(), "{}", wrong.join(", "));
                Ok(())
            })
            .await?;
        let node = self.nodes[0].clone();
        let agent = story
            .check("a new agent takes over what it finds", async {
                let mut agent = node.start_agent(&SETTINGS)?;
                node.ready(&mut agent, SOON).await?;
                Ok(agent)
            })
            .await?;
        self.agents.insert("node1".to_owned(), agent);
        let before: BTreeSet<IpAddr> = self.pods.values().map(|(_, pod)| pod.address()).collect();
        self.start_pod(story, &node, PodSpec::new("shop", "web-4")).await?;
        let fresh = self.address("shop/web-4")?;
        story.holds("its first new pod gets an address that nobody has", !before.contains(&fresh), fresh).await?;
        story
            .check("the same are blocked still, and the new web pod reaches the database", async {
                let ends: Vec<End> = self.pods.values().map(|(_, pod)| pod.end()).collect();
                let wrong = Matrix::probe(&ends, Protocol::Tcp, 80, PATIENCE).await?.differences(allowed);
                ensure!(wrong.is_empty(), "{}", wrong.join(", "));
                Ok(())
            })
            .await?;
        let talk = talk.stop();
        story.note(format!("{} messages came back, the slowest after {:.0} ms", talk.exchanges, talk.longest.as_secs_f64() * 1e3));
        let unbroken = talk.broken.is_none() && talk.exchanges > 100;
        story.holds("the conversation went on through all of it", unbroken, format!("{talk:?}")).await?;
        story
            .check("the lines written meanwhile arrive, from both sides of the rotation", async {
                self.delivered(|delivered| delivered.at_least_once((0..20).map(|n| format!("while the agent is dead {n}")))).await
            })
            .await?;
        Ok(())
    }

    /// Waits until what was delivered is as it should be.
    async fn delivered(&self, as_wanted: impl Fn(&Delivered) -> anyhow::Result<()>) -> anyhow::Result<Delivered> {
        wait_for("log events in CloudWatch", SOON, || async {
            let delivered = Delivered::read(self.vpc.cloud());
            as_wanted(&delivered)?;
            Ok(delivered)
        })
        .await
    }

    fn log(&mut self, pod: &str, line: &str) -> anyhow::Result<()> {
        let (_, pod) = self.pods.get_mut(pod).with_context(|| format!("no pod {pod}"))?;
        Ok(pod.log.line(Output::Stdout, line)?)
    }

    fn pod(&self, name: &str) -> anyhow::Result<&Pod> {
        self.pods.get(name).map(|(_, pod)| pod).with_context(|| format!("no pod {name}"))
    }

    fn address(&self, name: &str) -> anyhow::Result<IpAddr> {
        Ok(self.pod(name)?.address())
    }
}

// === ending ===

impl Stage {
    async fn pods_end(&mut self, story: &mut Story) -> anyhow::Result<()> {
        story.scene("The pods end", "Each is deleted as the kubelet does it. Nothing of them may stay on the nodes.");
        let pods = std::mem::take(&mut self.pods);
        story
            .check(&format!("all {} pods are deleted", pods.len()), async {
                for (_, (node, pod)) in pods {
                    node.delete_pod(pod).await?;
                }
                Ok(())
            })
            .await?;
        story
            .check("no interface, rule, route, pin, allocation or file of theirs is left", async {
                wait_for("the nodes to be clean", SOON, || async {
                    let mut left = Vec::new();
                    for node in &self.nodes {
                        left.extend(leftovers::of_pods(node)?);
                    }
                    ensure!(left.is_empty(), "{}", left.join("; "));
                    Ok(())
                })
                .await
            })
            .await
    }

    /// Ends the agents and takes the lab down.
    pub(crate) async fn strike(self, story: &mut Story) -> anyhow::Result<()> {
        let Self { agents, pods, nodes, vpc } = self;
        for (name, mut agent) in agents {
            story
                .check(&format!("the agent on {name} stops when asked"), async {
                    let status = agent.stop(SOON).await.with_context(|| agent.tail())?;
                    ensure!(status.success(), "{status}");
                    Ok(())
                })
                .await?;
        }
        drop((pods, nodes));
        let prefix = format!("stlab{}-", vpc.run_id());
        let dir = vpc.dir().to_owned();
        drop(vpc);
        let left = names(&prefix);
        story.holds("the lab itself is gone", left.is_empty() && !dir.exists(), format!("{left:?} {}", dir.display())).await
    }

    /// What the agents said last, when something did not hold.
    pub(crate) fn show_agents(&self, story: &Story) {
        for agent in self.agents.values() {
            story.note(format!("the end of {}:", agent.output().display()));
            story.show(agent.tail());
        }
    }

    /// Says how to look around and waits for Ctrl-C.
    pub(crate) async fn look_around(&self) -> anyhow::Result<()> {
        println!("{}", stanchion_lab::tour::of(&self.vpc, &self.nodes, self.pods.values().map(|(_, pod)| pod)));
        println!("Press Enter to go on with the story, Ctrl-C to end it.");
        let mut line = String::new();
        tokio::io::AsyncBufReadExt::read_line(&mut tokio::io::BufReader::new(tokio::io::stdin()), &mut line).await?;
        if line.is_empty() {
            // No terminal to press Enter on.
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

/// What the policy leaves: the database only for web pods, all else open.
fn allowed(from: &str, to: &str) -> bool {
    !to.starts_with("shop/db-") || from.starts_with("shop/web-")
}

async fn scrape(node: Node) -> anyhow::Result<String> {
    let netns: Netns = node.netns().clone();
    let text = netns
        .run_async(|| {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", 61678))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok::<_, std::io::Error>(text)
        })
        .await??;
    ensure!(text.lines().any(|line| line.starts_with("awscni_eni_allocated 2") || line.starts_with("awscni_eni_allocated 3")), "{text}");
    Ok(text)
}

fn topology(nodes: &[Node; 2]) -> String {
    let [one, two] = nodes;
    let side = |node: &Node| format!("{} {} {}", node.name(), node.instance_type(), node.primary());
    let (left, right) = (side(one), side(two));
    format!(
        "\x20               internet: {EXAMPLE_HOST}, EC2, CloudWatch Logs\n\
         \x20                   |\n\
         \x20                router: VPC 10.0.0.0/16, a subnet in each of two zones\n\
         \x20               /      \\\n\
         \x20         eth0 /        \\ eth0\n\
         {left:<30}{right}\n"
    )
}
