//! How to look around in a lab: exact commands for its namespaces.

use std::fmt::Write as _;

use crate::node::Node;
use crate::pod::Pod;
use crate::vpc::Vpc;

/// The commands, for a person with a second terminal.
pub fn of<'a>(vpc: &Vpc, nodes: &[Node], pods: impl IntoIterator<Item = &'a Pod>) -> String {
    let mut text = String::from("\nThe lab is up. In another terminal, as root:\n");
    let mut line = |what: &str, command: String| {
        writeln!(text, "\n  # {what}\n  {command}").expect("writing to a string");
    };
    for node in nodes {
        let (name, netns, socket) = (node.name(), node.netns().name(), node.socket().display().to_string());
        let stanchion = node.binaries().stanchion.display().to_string();
        line(&format!("{name}: interfaces, rules, its agent's view, its agent's output"), {
            format!(
                "ip netns exec {netns} ip -d addr; ip netns exec {netns} ip rule\n  {stanchion} status --socket {socket}\n  \
                 {stanchion} endpoints --socket {socket}\n  tail -f {}",
                node.agent_output().display()
            )
        });
    }
    for pod in pods.into_iter().take(2) {
        line(&format!("{} at {}", pod.name(), pod.address()), format!("nsenter --net={} ip addr", pod.netns().path().display()));
    }
    line("the router: which source may leave which ENI", format!("ip netns exec {} nft list ruleset", vpc.router().name()));
    line("packets between the nodes", format!("ip netns exec {} tcpdump -ni any", vpc.router().name()));
    line("the cluster as the agents read it: edit, add and remove manifests", format!("ls {}", vpc.manifests().dir().display()));
    text
}
