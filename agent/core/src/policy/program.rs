//! What a policy set says: the rules of the policies that select an endpoint in one direction, in order of evaluation,
//! ready to be asked about a peer's signature.

use crate::objects::Protocol;

use super::model::{Action, Direction};
use super::ports::{Decision, Draft, Entry, Outcome, PortFunction, entries};

/// What an address is to the policies of this node: the meaning of an identity. Addresses with equal signatures are
/// treated alike by every policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Signature {
    /// Peer lists that it is in, sorted.
    pub(super) terms: Vec<u32>,
    /// Numbers of its named ports that egress rules use: name, protocol, number; sorted.
    pub(super) named: Vec<(u32, Protocol, u16)>,
    /// For a service address: its ports, each with the identities and target ports of its backends; sorted.
    pub(super) services: Vec<ServicePort>,
}

impl Signature {
    /// Nothing is known of it.
    pub(super) fn is_empty(&self) -> bool {
        self.terms.is_empty() && self.named.is_empty() && self.services.is_empty()
    }
}

/// A port of a service address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ServicePort {
    /// Its protocol.
    pub(super) protocol: Protocol,
    /// Its number.
    pub(super) port: u16,
    /// The address is none that the cluster gave to the service.
    pub(super) is_external: bool,
    /// Identities (or [`OWN_NODE`]) and target ports behind it, sorted, without duplicates.
    pub(super) backends: Vec<(u32, u16)>,
}

/// Stands for the own node among a service's backends: traffic with it always passes.
pub(super) const OWN_NODE: u32 = u32::MAX;

/// A rule as compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProgramRule {
    /// Interned name of the rule.
    pub(super) id: u32,
    /// What it does.
    pub(super) action: Action,
    /// The peer list; `None`: anyone.
    pub(super) term: Option<u32>,
    /// Ports; `None`: every protocol.
    pub(super) ports: Option<ProgramPorts>,
}

/// Ports of a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ProgramPorts {
    /// Protocol, first and last port.
    pub(super) ranges: Vec<(Protocol, u16, u16)>,
    /// Names to look up on the peer (egress), with the protocol if the rule gives one.
    pub(super) names: Vec<(Option<Protocol>, u32)>,
}

/// A policy set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    /// Which way.
    pub(super) direction: Direction,
    /// Rules of the Admin tier, first match first.
    pub(super) admin: Vec<ProgramRule>,
    /// Rules of NetworkPolicies; `None`: none selects the endpoint.
    pub(super) namespace: Option<Vec<ProgramRule>>,
    /// Rules of the Baseline tier.
    pub(super) baseline: Vec<ProgramRule>,
    /// What passes where none of them decides.
    otherwise: Decision,
    /// Peer lists that occur, sorted.
    terms: Vec<u32>,
    /// Port names to look up on peers, sorted.
    names: Vec<u32>,
    /// Some peer is a DNS name.
    pub(super) by_name: bool,
    /// What it says of a peer that is nothing to it.
    pub(super) wildcard: PortFunction<Decision>,
}

impl Program {
    /// Of the rules in order.
    pub(super) fn new(
        direction: Direction,
        admin: Vec<ProgramRule>,
        namespace: Option<Vec<ProgramRule>>,
        baseline: Vec<ProgramRule>,
        otherwise: Decision,
    ) -> Self {
        let mut terms = Vec::new();
        let mut names = Vec::new();
        for rule in admin.iter().chain(namespace.iter().flatten()).chain(&baseline) {
            terms.extend(rule.term);
            names.extend(rule.ports.iter().flat_map(|ports| &ports.names).map(|(_, name)| *name));
        }
        for list in [&mut terms, &mut names] {
            list.sort_unstable();
            list.dedup();
        }
        let wildcard = PortFunction::constant(Decision::DENY);
        let mut program = Self { direction, admin, namespace, baseline, otherwise, terms, names, by_name: false, wildcard };
        program.wildcard = program.decide_address(&[], &[]);
        program
    }

    /// The set of an endpoint whose policies are not known: nothing passes.
    pub(super) fn closed(direction: Direction) -> Self {
        Self::new(direction, Vec::new(), None, Vec::new(), Decision::DENY)
    }

    /// Peer lists that occur.
    pub(super) fn terms(&self) -> &[u32] {
        &self.terms
    }

    /// Port names to look up on peers.
    pub(super) fn names(&self) -> &[u32] {
        &self.names
    }

    /// Whether the set treats such a peer in any other way than one that is nothing to it.
    pub(super) fn knows(&self, signature: &Signature) -> bool {
        intersects(&self.terms, signature.terms.iter().copied())
            || intersects(&self.names, signature.named.iter().map(|(name, _, _)| *name))
            || (self.direction == Direction::Egress && !signature.services.is_empty())
    }

    /// Decides for every protocol and port of a peer. `signature_of` gives the meaning of a backend's identity.
    pub(super) fn decide<'a>(&self, signature: &Signature, signature_of: &impl Fn(u32) -> &'a Signature) -> PortFunction<Decision> {
        let mut function = self.decide_address(&signature.terms, &signature.named);
        if self.direction == Direction::Ingress {
            return function;
        }
        for service in &signature.services {
            let decision = self.decide_backends(service, signature_of);
            // Whoever writes services names their external addresses: what a rule denies is not opened by that.
            let is_denied = |address: Decision| service.is_external && !address.allow && address.rule != 0;
            function.update(service.protocol, service.port, service.port, |address| if is_denied(address) { address } else { decision });
        }
        function
    }

    /// A service port is open if whatever backend is chosen is open: the choice falls after the check. The rule named is the
    /// least, so that it does not depend on the numbers of identities.
    fn decide_backends<'a>(&self, service: &ServicePort, signature_of: &impl Fn(u32) -> &'a Signature) -> Decision {
        let decisions = service.backends.iter().map(|(identity, target)| {
            if *identity == OWN_NODE {
                return Decision::ALLOW;
            }
            let backend = signature_of(*identity);
            self.decide_address(&backend.terms, &backend.named).at(service.protocol, *target)
        });
        // Denials before permissions, and those by a rule before isolation, which audit lifts.
        decisions.min_by_key(|decision| (decision.allow, decision.rule == 0, decision.rule)).unwrap_or(Decision::DENY)
    }

    fn decide_address(&self, terms: &[u32], named: &[(u32, Protocol, u16)]) -> PortFunction<Decision> {
        let mut draft = Draft::default();
        let mut ask = |rules: &[ProgramRule]| {
            for rule in rules.iter().filter(|rule| rule.term.is_none_or(|term| terms.binary_search(&term).is_ok())) {
                settle(&mut draft, rule, named);
            }
            draft.next_tier();
        };
        ask(&self.admin);
        let otherwise = if let Some(rules) = &self.namespace {
            ask(rules);
            Decision::DENY
        } else {
            ask(&self.baseline);
            self.otherwise
        };
        draft.finish(otherwise)
    }

    /// Entries of the wildcard identity: where it is not the maps' default.
    pub(super) fn wildcard_entries(&self) -> Vec<Entry> {
        entries(&self.wildcard, &PortFunction::constant(Decision::DENY))
    }

    /// Entries of an identity: where it is not as the wildcard.
    pub(super) fn entries_of<'a>(&self, signature: &Signature, signature_of: &impl Fn(u32) -> &'a Signature) -> Vec<Entry> {
        entries(&self.decide(signature, signature_of), &self.wildcard)
    }
}

/// Decides what the rule matches and nothing before it did.
fn settle(draft: &mut Draft, rule: &ProgramRule, named: &[(u32, Protocol, u16)]) {
    let outcome = match rule.action {
        Action::Allow => Outcome::Done(Decision { allow: true, rule: rule.id }),
        Action::Deny => Outcome::Done(Decision { allow: false, rule: rule.id }),
        Action::Pass => Outcome::Passed,
    };
    let Some(ports) = &rule.ports else {
        draft.settle_all(outcome);
        return;
    };
    for (protocol, first, last) in &ports.ranges {
        draft.settle(*protocol, *first, *last, outcome);
    }
    for (wanted, name) in &ports.names {
        for (_, protocol, number) in named.iter().filter(|(n, p, _)| n == name && wanted.is_none_or(|w| w == *p)) {
            draft.settle(*protocol, *number, *number, outcome);
        }
    }
}

fn intersects(sorted: &[u32], others: impl Iterator<Item = u32>) -> bool {
    !sorted.is_empty() && others.into_iter().any(|other| sorted.binary_search(&other).is_ok())
}
