//! The VPC's router and the internet behind it, made of two namespaces.
//!
//! Every ENI is a cable (veth) of its own from its node to the router. The router knows what is assigned to each ENI: it
//! routes each address over that ENI's cable with the ENI's MAC (nothing is resolved, as in EC2), answers ARP for the
//! whole subnet, drops whatever leaves an ENI with a source that is not assigned to it, and lets only addresses with a
//! public one out to the internet (one to one, as an internet gateway does). IPv6 stays in the VPC: there is none on the internet.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

use anyhow::Context;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use stanchion_core::ids::EniId;

use crate::netns::{self, Netns};
use crate::wires::{Step, Wire, router_if, steps};

/// Largest frame of a VPC, as EC2 has it.
pub const MTU: u32 = 9001;

/// The metadata service's address, as every instance sees it.
pub const IMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// The router's address on every cable, where the VPC has IPv6; beside AWS's own.
pub const ROUTER_IPV6: &str = "fe80::1";

const TABLE: &str = "stanchion_lab";
/// The router's interface to the internet and the link between the two.
const UPLINK: &str = "internet";
const UPLINK_ROUTER: &str = "192.0.2.1";
const UPLINK_INTERNET: &str = "192.0.2.2";

/// The two namespaces and the wiring as it is now.
#[derive(Debug)]
pub struct Router {
    netns: Netns,
    wiring: BTreeMap<EniId, Wire>,
    has_ipv6: bool,
}

/// Frames that the router refused since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// The source was not assigned to the ENI they left from.
    pub wrong_source: u64,
    /// To the internet from an address without a public one.
    pub no_public_address: u64,
}

impl Router {
    /// Sets both namespaces up: `hosts` are the addresses that exist on the internet.
    pub fn build(netns: Netns, internet: &Netns, vpc: &[Ipv4Net], vpc6: &[Ipv6Net], hosts: &[Ipv4Addr]) -> anyhow::Result<Self> {
        for key in ["conf/all/rp_filter", "conf/default/rp_filter", "conf/all/send_redirects", "conf/default/send_redirects"] {
            netns::sysctl(&netns, &format!("net/ipv4/{key}"), "0")?;
        }
        netns::sysctl(&netns, "net/ipv4/ip_forward", "1")?;
        let has_ipv6 = !vpc6.is_empty();
        if has_ipv6 {
            // Its link-local addresses are there at once.
            netns::sysctl(&netns, "net/ipv6/conf/default/accept_dad", "0")?;
            netns::sysctl(&netns, "net/ipv6/conf/all/forwarding", "1")?;
        }
        let mut router = format!(
            "link add {UPLINK} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {}\n\
             addr add {UPLINK_ROUTER}/30 dev {UPLINK}\nlink set {UPLINK} up\naddr add {IMDS_ADDRESS}/32 dev lo\n\
             route add default via {UPLINK_INTERNET}\n",
            internet.name()
        );
        for cidr in vpc.iter().copied().map(IpNet::from).chain(vpc6.iter().copied().map(IpNet::from)) {
            writeln!(router, "route add unreachable {cidr}")?;
        }
        netns::ip_batch(netns.name(), &router)?;
        let mut outside = format!("addr add {UPLINK_INTERNET}/30 dev eth0\nlink set eth0 up\nroute add default via {UPLINK_ROUTER}\n");
        for host in hosts {
            writeln!(outside, "addr add {host}/32 dev lo")?;
        }
        netns::ip_batch(internet.name(), &outside)?;
        nft(
            &netns,
            &format!(
                "table ip {TABLE} {{
                    set assigned {{ type ifname . ipv4_addr; flags interval; }}
                    set public {{ type ipv4_addr; }}
                    map out {{ type ipv4_addr : ipv4_addr; }}
                    map in {{ type ipv4_addr : ipv4_addr; }}
                    counter wrong_source {{ }}
                    counter no_public_address {{ }}
                    chain source_check {{
                        type filter hook prerouting priority raw; policy accept;
                        iifname {{ \"{UPLINK}\", \"lo\" }} accept
                        iifname . ip saddr @assigned accept
                        counter name wrong_source drop
                    }}
                    chain internet_gateway {{
                        type filter hook forward priority filter; policy accept;
                        oifname \"{UPLINK}\" ip saddr != @public counter name no_public_address drop
                    }}
                    chain out_of_vpc {{
                        type nat hook postrouting priority srcnat; policy accept;
                        oifname \"{UPLINK}\" snat to ip saddr map @out
                    }}
                    chain into_vpc {{
                        type nat hook prerouting priority dstnat; policy accept;
                        iifname \"{UPLINK}\" dnat to ip daddr map @in
                    }}
                }}
                table ip6 {TABLE} {{
                    set assigned {{ type ifname . ipv6_addr; flags interval; }}
                    counter wrong_source {{ }}
                    chain source_check {{
                        type filter hook prerouting priority raw; policy accept;
                        iifname {{ \"{UPLINK}\", \"lo\" }} accept
                        ip6 saddr {{ ::, fe80::/10 }} accept
                        iifname . ip6 saddr @assigned accept
                        counter name wrong_source drop
                    }}
                }}"
            ),
        )?;
        Ok(Self { netns, wiring: BTreeMap::new(), has_ipv6 })
    }

    /// The router's namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// What is plugged in now.
    pub fn wiring(&self) -> &BTreeMap<EniId, Wire> {
        &self.wiring
    }

    /// Makes the cables so.
    pub fn apply(&mut self, wanted: &BTreeMap<EniId, Wire>) -> anyhow::Result<()> {
        for step in steps(&self.wiring, wanted) {
            self.perform(&step).with_context(|| format!("{step:?}"))?;
            match step {
                Step::Plug(wire) => {
                    self.wiring.insert(wire.eni.clone(), wire);
                }
                Step::Unplug(wire) => {
                    self.wiring.remove(&wire.eni);
                }
                Step::Assign(wire, net) => {
                    self.wiring.entry(wire.eni.clone()).or_insert(wire).secondary.insert(net);
                }
                Step::Unassign(wire, net) => {
                    self.wiring.entry(wire.eni.clone()).or_insert(wire).secondary.remove(&net);
                }
            }
        }
        Ok(())
    }

    fn perform(&self, step: &Step) -> anyhow::Result<()> {
        match step {
            Step::Plug(wire) => self.plug(wire),
            Step::Unplug(wire) => self.unplug(wire),
            Step::Assign(wire, net) => {
                netns::ip_batch(self.netns.name(), &route("add", wire, *net))?;
                nft(&self.netns, &element("add", wire, *net))
            }
            Step::Unassign(wire, net) => {
                nft(&self.netns, &element("delete", wire, *net))?;
                netns::ip_batch(self.netns.name(), &route("del", wire, *net))
            }
        }
    }

    fn plug(&self, wire: &Wire) -> anyhow::Result<()> {
        let name = wire.router_if();
        let (netns, node_if, mac, primary) = (&wire.netns, &wire.if_name, wire.mac, wire.primary);
        // The allowed sources first: the node may send as soon as its end is there.
        let all = || std::iter::once(IpNet::from(IpAddr::from(primary))).chain(wire.secondary.iter().copied());
        let mut rules: String = all().map(|net| element("add", wire, net)).collect();
        if let Some(public) = wire.public {
            write!(
                rules,
                "add element ip {TABLE} out {{ {primary} : {public} }}\nadd element ip {TABLE} in {{ {public} : {primary} }}\n\
                 add element ip {TABLE} public {{ {primary} }}\n"
            )?;
        }
        nft(&self.netns, &rules)?;
        let link = match &wire.over {
            Some((trunk, vlan)) => format!("link add {name} link {} mtu {MTU} type vlan id {vlan}\n", router_if(trunk)),
            None => format!("link add {name} mtu {MTU} type veth peer name {node_if} address {mac} mtu {MTU} netns {netns}\n"),
        };
        netns::ip_batch(self.netns.name(), &link)?;
        // A proxied reply is delayed by up to 0.8 s unless told otherwise.
        netns::sysctl(&self.netns, &format!("net/ipv4/neigh/{name}/proxy_delay"), "0")?;
        netns::sysctl(&self.netns, &format!("net/ipv4/conf/{name}/proxy_arp"), "1")?;
        let mut lines = format!(
            "link set {name} up\naddr add {}/32 dev {name}\nneigh add {primary} lladdr {mac} nud permanent dev {name}\n\
             route add {primary}/32 dev {name} src {}\n",
            wire.gateway(),
            wire.gateway()
        );
        if self.has_ipv6 {
            for address in [ROUTER_IPV6, "fe80:ec2::1"] {
                writeln!(lines, "addr add {address}/64 dev {name} nodad")?;
            }
            writeln!(lines, "neigh add {} lladdr {mac} nud permanent dev {name}", wire.link_local())?;
        }
        lines.extend(wire.secondary.iter().map(|net| route("add", wire, *net)));
        netns::ip_batch(self.netns.name(), &lines)
    }

    fn unplug(&self, wire: &Wire) -> anyhow::Result<()> {
        // Routes and the neighbour go with the link.
        netns::ip_batch(self.netns.name(), &format!("link del {}\n", wire.router_if()))?;
        let primary = wire.primary;
        let all = std::iter::once(IpNet::from(IpAddr::from(primary))).chain(wire.secondary.iter().copied());
        let mut rules: String = all.map(|net| element("delete", wire, net)).collect();
        if let Some(public) = wire.public {
            write!(
                rules,
                "delete element ip {TABLE} out {{ {primary} : {public} }}\ndelete element ip {TABLE} in {{ {public} : {primary} }}\n\
                 delete element ip {TABLE} public {{ {primary} }}\n"
            )?;
        }
        nft(&self.netns, &rules)
    }

    /// What was refused so far.
    pub fn refused(&self) -> anyhow::Result<Refused> {
        let output = self.netns.output(Command::new("nft").args(["-j", "list", "counters"]))?;
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).context("read nft's counters")?;
        let packets = |name: &str| {
            let counters = json["nftables"].as_array().into_iter().flatten();
            counters.filter(|c| c["counter"]["name"] == name).filter_map(|c| c["counter"]["packets"].as_u64()).sum()
        };
        Ok(Refused { wrong_source: packets("wrong_source"), no_public_address: packets("no_public_address") })
    }
}

fn route(verb: &str, wire: &Wire, net: IpNet) -> String {
    let via = if net.addr().is_ipv4() { IpAddr::from(wire.primary) } else { wire.link_local().into() };
    format!("route {verb} {net} via {via} dev {} onlink\n", wire.router_if())
}

fn element(verb: &str, wire: &Wire, net: IpNet) -> String {
    let family = if net.addr().is_ipv4() { "ip" } else { "ip6" };
    format!("{verb} element {family} {TABLE} assigned {{ \"{}\" . {net} }}\n", wire.router_if())
}

fn nft(netns: &Netns, rules: &str) -> anyhow::Result<()> {
    netns.run(|| netns::feed(Command::new("nft").args(["-f", "-"]), rules))?
}
