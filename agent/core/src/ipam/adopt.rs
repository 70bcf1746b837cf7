//! From what IMDS and EC2 show to what the store holds: which ENIs are ours, what pods may use, what is gone.
//!
//! IMDS is eventually consistent (seconds, sometimes a minute, and an ENI may be missing for a while), so nothing is
//! deleted on its word.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::plan::Placement;
use super::store::{EniRole, EniState, StoredEni};
use super::types::Time;
use crate::cloud::{Eni, EniKind, ImdsEni, InstanceIdentity, Subnet};
use crate::ids::{InstanceId, SecurityGroupId, SubnetId};
use crate::limits::InstanceLimits;
use crate::network::eni_route_table;
use crate::objects::{EniConfig, Node};

/// The instance for which an ENI was made.
pub const TAG_INSTANCE: &str = "node.k8s.amazonaws.com/instance_id";
/// When it was made, RFC 3339.
pub const TAG_CREATED: &str = "node.k8s.amazonaws.com/createdAt";
/// "true" keeps us from touching an ENI.
pub const TAG_NO_MANAGE: &str = "node.k8s.amazonaws.com/no_manage";
/// The cluster.
pub const TAG_CLUSTER: &str = "cluster.k8s.amazonaws.com/name";
/// Who makes ENIs, for the VPC resource controller's sweep.
const TAG_OWNER: (&str, &str) = ("eks:eni:owner", "amazon-vpc-cni");
/// Descriptions of our ENIs begin with it.
pub const DESCRIPTION_PREFIX: &str = "aws-K8S-";
/// "0" keeps pods out of a subnet, anything else lets them in.
const TAG_SUBNET_ROLE: &str = "kubernetes.io/role/cni";
/// Security groups with this tag are those of ENIs in subnets that discovery found.
pub const TAG_GROUP_ROLE: (&str, &str) = (TAG_SUBNET_ROLE, "1");
/// Subnets with such a tag are for the named clusters only.
const TAG_SUBNET_CLUSTER: &str = "cni.networking.k8s.aws/cluster/";

/// An ENI found `available` that is older than this was left behind.
const LEAKED_AFTER: std::time::Duration = std::time::Duration::from_secs(300);

/// What decides an ENI's role.
#[derive(Clone, Debug)]
pub struct Adoption<'a> {
    /// This instance.
    pub identity: &'a InstanceIdentity,
    /// AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG.
    pub custom_networking: bool,
    /// MANAGE_UNTAGGED_ENI.
    pub manage_untagged: bool,
    /// Cards whose ENIs are managed, and how many ENIs each may have.
    pub cards: &'a [(u16, u16)],
    /// Subnets tagged `kubernetes.io/role/cni=0`.
    pub excluded_subnets: &'a BTreeSet<SubnetId>,
    /// Addresses that pods hold or held lately: without EC2's word an ENI is ours by one of them. `None` where EC2 is never asked and IMDS
    /// alone decides (ENABLE_IMDS_ONLY_MODE).
    pub given_out: Option<&'a BTreeSet<IpAddr>>,
    /// Slots of an ENI besides its own address.
    pub slots: u16,
    /// Now.
    pub now: Time,
}

impl Adoption<'_> {
    /// The role of an ENI; `ec2` is `None` when EC2 could not be asked.
    pub fn role(&self, imds: Option<&ImdsEni>, ec2: Option<&Eni>) -> EniRole {
        let primary = self.is_primary(imds, ec2);
        let subnet = ec2.map(|eni| &eni.subnet).or(imds.map(|eni| &eni.subnet));
        let excluded = subnet.is_some_and(|subnet| self.excluded_subnets.contains(subnet));
        if primary {
            return match (self.custom_networking, excluded) {
                (true, _) => EniRole::PrimaryOfCustomNetworking,
                (false, true) => EniRole::ExcludedSubnet,
                (false, false) => EniRole::Pods,
            };
        }
        let kind = kind_of(imds, ec2);
        if matches!(kind, EniKind::EfaOnly) {
            return EniRole::EfaOnly;
        }
        if let Some(eni) = ec2 {
            let ours = eni.tags.get(TAG_INSTANCE).is_some_and(|instance| *instance == self.identity.instance.as_str());
            let hands_off = eni.tags.get(TAG_NO_MANAGE).is_some_and(|value| value == "true");
            let untagged = !ours && !self.manage_untagged && kind != EniKind::Trunk;
            if hands_off || untagged || matches!(kind, EniKind::Branch | EniKind::Other) {
                return EniRole::Unmanaged;
            }
        } else if imds.is_some_and(|eni| !self.gave_of(eni)) {
            return EniRole::Unconfirmed;
        }
        let card =
            imds.map(|eni| eni.network_card).or(ec2.and_then(|eni| eni.attachment.as_ref()).map(|attachment| attachment.network_card));
        match (kind, card) {
            (EniKind::Trunk, _) => EniRole::Trunk,
            (_, Some(card)) if !self.cards.iter().any(|(managed, _)| *managed == card) => EniRole::OtherCard,
            _ if excluded => EniRole::ExcludedSubnet,
            _ => EniRole::Pods,
        }
    }

    /// The instance's first ENI, by the Ethernet address that IMDS names.
    fn is_primary(&self, imds: Option<&ImdsEni>, ec2: Option<&Eni>) -> bool {
        imds.map(|eni| eni.mac).or(ec2.map(|eni| eni.mac)) == Some(self.identity.primary_mac)
    }

    /// Whether its tags need not be known: its addresses were given out.
    fn gave_of(&self, eni: &ImdsEni) -> bool {
        let cidrs = imds_cidrs(eni);
        self.given_out.is_none_or(|given| given.iter().any(|address| cidrs.iter().any(|cidr| cidr.contains(address))))
    }

    /// The record of an ENI that IMDS or EC2 (or both) show as attached to this instance; `None` when neither knows how.
    /// EC2's addresses count where EC2 was asked: an address that only a stale IMDS shows is not ours to give out.
    pub fn record(&self, imds: Option<&ImdsEni>, ec2: Option<&Eni>, subnet: Option<&Subnet>) -> Option<StoredEni> {
        let attachment = ec2.and_then(|eni| eni.attachment.as_ref());
        let attached_at = imds.map(|eni| eni.device_index).or(attachment.map(|attachment| attachment.device_index))?;
        let on_card = imds.map(|eni| eni.network_card).or(attachment.map(|attachment| attachment.network_card))?;
        // On some (SageMaker HyperPod) it is not attached at index 0, and is the node's own for all that.
        let (network_card, device_index) = if self.is_primary(imds, ec2) { (0, 0) } else { (on_card, attached_at) };
        let primary_ipv4 = ec2.and_then(|eni| eni.primary_ipv4).or(imds.and_then(|eni| eni.local_ipv4s.first().copied()));
        let cidrs = match (ec2, imds) {
            (Some(eni), _) => ec2_cidrs(eni),
            (None, Some(eni)) => imds_cidrs(eni),
            (None, None) => return None,
        };
        Some(StoredEni {
            id: ec2.map(|eni| eni.id.clone()).or(imds.map(|eni| eni.id.clone()))?,
            mac: ec2.map(|eni| eni.mac).or(imds.map(|eni| eni.mac))?,
            device_index,
            network_card,
            attached_at,
            subnet: ec2.map(|eni| eni.subnet.clone()).or(imds.map(|eni| eni.subnet.clone()))?,
            subnet_cidr: imds.and_then(|eni| eni.subnet_cidr).or(subnet.map(|subnet| subnet.cidr)),
            subnet_ipv6_cidrs: imds
                .map(|eni| eni.subnet_ipv6_cidrs.clone())
                .or(subnet.map(|subnet| subnet.ipv6_cidrs.clone()))
                .unwrap_or_default(),
            primary_ipv4,
            kind: kind_of(imds, ec2),
            attachment: attachment.map(|attachment| attachment.id.clone()),
            security_groups: ec2.map(|eni| eni.security_groups.clone()).or(imds.map(|eni| eni.security_groups.clone())).unwrap_or_default(),
            role: self.role(imds, ec2),
            added: self.now,
            slots: self.slots,
            route_table: eni_route_table(u32::from(network_card), u32::from(device_index)),
            state: EniState::Serving,
            cidrs: cidrs.into_iter().filter(|cidr| Some(cidr.addr()) != primary_ipv4.map(Into::into)).map(|cidr| (cidr, false)).collect(),
        })
    }
}

/// The network cards whose ENIs are managed and how many each may have: the first one, and where pods may have several interfaces
/// (ENABLE_MULTI_NIC) every other card but those that were given to EFA alone.
pub fn managed_cards(
    limits: &InstanceLimits,
    first_card_enis: u16,
    multi_nic: bool,
    imds: &[ImdsEni],
    ec2: Option<&[Eni]>,
) -> Vec<(u16, u16)> {
    let kinds_on = |card: u16| -> Vec<EniKind> {
        let described = |shown: &ImdsEni| ec2.and_then(|enis| enis.iter().find(|eni| eni.id == shown.id));
        imds.iter().filter(|eni| eni.network_card == card).map(|eni| kind_of(Some(eni), described(eni))).collect()
    };
    let for_efa = |card: u16| {
        let kinds = kinds_on(card);
        !kinds.is_empty() && kinds.iter().all(|kind| *kind == EniKind::EfaOnly)
    };
    let further = limits.network_cards.iter().filter(|(card, _)| multi_nic && *card != 0 && !for_efa(*card));
    std::iter::once((0, first_card_enis)).chain(further.copied()).collect()
}

fn kind_of(imds: Option<&ImdsEni>, ec2: Option<&Eni>) -> EniKind {
    match (ec2, imds) {
        (Some(eni), _) => eni.kind,
        // Only EFA-only devices have no address at all.
        (None, Some(eni)) if eni.local_ipv4s.is_empty() && eni.ipv6s.is_empty() => EniKind::EfaOnly,
        _ => EniKind::Interface,
    }
}

/// What pods could use of an ENI as EC2 describes it.
pub fn ec2_cidrs(eni: &Eni) -> Vec<IpNet> {
    let singles = eni.secondary_ipv4.iter().map(|address| IpNet::V4(Ipv4Net::from(*address)));
    singles.chain(eni.prefixes_v4.iter().copied().map(IpNet::V4)).chain(eni.prefixes_v6.iter().copied().map(IpNet::V6)).collect()
}

/// What pods could use of an ENI as IMDS shows it: the first address is the ENI's own.
pub fn imds_cidrs(eni: &ImdsEni) -> Vec<IpNet> {
    let singles = eni.local_ipv4s.iter().skip(1).map(|address| IpNet::V4(Ipv4Net::from(*address)));
    singles.chain(eni.prefixes_v4.iter().copied().map(IpNet::V4)).chain(eni.prefixes_v6.iter().copied().map(IpNet::V6)).collect()
}

/// Tags of a new ENI; `created` is RFC 3339.
pub fn tags_for_new(
    instance: &InstanceId,
    cluster: &str,
    additional: &BTreeMap<String, String>,
    created: String,
) -> BTreeMap<String, String> {
    let mut tags = additional.clone();
    tags.insert(TAG_INSTANCE.to_owned(), instance.to_string());
    tags.insert(TAG_CREATED.to_owned(), created);
    if !cluster.is_empty() {
        tags.insert(TAG_CLUSTER.to_owned(), cluster.to_owned());
        tags.insert(TAG_OWNER.0.to_owned(), TAG_OWNER.1.to_owned());
    }
    tags
}

/// Tags that an attached ENI of ours lacks.
pub fn missing_tags(eni: &Eni, instance: &InstanceId, cluster: &str, additional: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut tags = tags_for_new(instance, cluster, additional, String::new());
    // An ENI that we did not make has no birthday that we know.
    tags.remove(TAG_CREATED);
    tags.retain(|key, _| !eni.tags.contains_key(key));
    tags
}

/// The security groups of ENIs for pods in a subnet: the primary ENI's; in another subnet than the node's, which discovery found, those of the VPC
/// that are `tagged` for pods, if there are any. `None`: EC2 has not told which those are.
pub fn groups_in<'a>(
    subnet: &SubnetId,
    node: &SubnetId,
    primary: &'a [SecurityGroupId],
    tagged: Option<&'a [SecurityGroupId]>,
) -> Option<&'a [SecurityGroupId]> {
    if subnet == node {
        return Some(primary);
    }
    tagged.map(|tagged| if tagged.is_empty() { primary } else { tagged })
}

/// ENIs for pods whose security groups are not those that are `wanted` in their subnets: a change of the node's groups is to reach all of them.
/// Under custom networking the ENIConfig decides, and a trunk's groups are the controller's.
pub fn enis_with_other_groups<'a>(
    enis: impl Iterator<Item = &'a StoredEni>,
    wanted: impl Fn(&SubnetId) -> Option<&'a [SecurityGroupId]>,
) -> Vec<(&'a StoredEni, &'a [SecurityGroupId])> {
    let ours = |eni: &StoredEni| {
        matches!(eni.role, EniRole::Pods | EniRole::ExcludedSubnet) && !eni.is_primary() && eni.state != EniState::Releasing
    };
    let differs = |eni: &StoredEni, wanted: &[SecurityGroupId]| {
        !wanted.is_empty() && eni.security_groups.iter().collect::<BTreeSet<_>>() != wanted.iter().collect()
    };
    enis.filter(|eni| ours(eni)).filter_map(|eni| Some((eni, wanted(&eni.subnet)?))).filter(|(eni, wanted)| differs(eni, wanted)).collect()
}

/// What to do with an ENI that is `available` and carries our tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leak {
    /// Not ours, or too young: another node may be about to attach it.
    Leave,
    /// Nobody knows its age: tag it with the time and look again.
    TagAge,
    /// Left behind.
    Delete,
}

/// Judges an `available` ENI. One that was made for this very instance and that no action of ours has in hand is left
/// behind whatever its age: the process that made it is gone.
pub fn judge_leak(eni: &Eni, own: &InstanceId, in_hand: bool, now: Time) -> Leak {
    if eni.attachment.is_some() || eni.status != "available" || !eni.description.starts_with(DESCRIPTION_PREFIX) || in_hand {
        return Leak::Leave;
    }
    if eni.tags.get(TAG_INSTANCE).is_some_and(|instance| instance == own.as_str()) {
        return Leak::Delete;
    }
    let created = eni.tags.get(TAG_CREATED).and_then(|created| created.parse::<jiff::Timestamp>().ok());
    match created.and_then(|created| u64::try_from(created.as_millisecond()).ok()) {
        None => Leak::TagAge,
        Some(created) if now.since(Time(created)) > LEAKED_AFTER => Leak::Delete,
        Some(_) => Leak::Leave,
    }
}

/// The ENIConfig that a node's label, annotation or zone names: aws-node's order.
pub fn eni_config_name<'a>(node: &'a Node, annotation: &str, label: &str) -> &'a str {
    let meta = &node.metadata;
    meta.labels
        .get("vpc.amazonaws.com/externalEniConfig")
        .or_else(|| meta.annotations.get(annotation))
        .or_else(|| meta.labels.get(label))
        .map_or("default", String::as_str)
}

/// Where custom networking puts new ENIs.
pub fn place_by_eni_config(name: &str, config: Option<&EniConfig>, primary_groups: &[SecurityGroupId]) -> Placement {
    let Some(config) = config else {
        return Placement::Nowhere(format!("the node asks for ENIConfig {name:?}, which does not exist"));
    };
    if config.spec.subnet.is_empty() {
        return Placement::Nowhere(format!("ENIConfig {name:?} names no subnet"));
    }
    let mut groups: Vec<_> = config.spec.security_groups.iter().map(|group| SecurityGroupId::new(group.clone())).collect();
    if groups.is_empty() {
        groups = primary_groups.to_vec();
    }
    groups.sort();
    Placement::Subnets { subnets: vec![SubnetId::new(config.spec.subnet.clone())], security_groups: groups }
}

/// Where new ENIs go without custom networking: the primary ENI's subnet and, with discovery, tagged ones of the zone, those
/// with the most free addresses first. `subnets` are those of the VPC and zone.
pub fn place_by_discovery(subnets: &[Subnet], primary: &SubnetId, cluster: &str, discovery: bool, groups: &[SecurityGroupId]) -> Placement {
    let mut groups = groups.to_vec();
    groups.sort();
    let mut usable: Vec<&Subnet> = subnets.iter().filter(|subnet| discovery && subnet_is_usable(subnet, primary, cluster)).collect();
    usable.sort_by_key(|subnet| (std::cmp::Reverse(subnet.available_addresses), subnet.id.clone()));
    let mut chosen: Vec<SubnetId> = usable.into_iter().map(|subnet| subnet.id.clone()).collect();
    if !discovery || subnets.is_empty() {
        chosen = vec![primary.clone()];
    }
    if chosen.is_empty() {
        return Placement::Nowhere("every subnet of the zone is excluded by its tags".to_owned());
    }
    Placement::Subnets { subnets: chosen, security_groups: groups }
}

/// Whether new ENIs may go to another subnet than the node's.
pub fn finds_other_subnets(subnets: &[Subnet], primary: &SubnetId, cluster: &str) -> bool {
    subnets.iter().any(|subnet| subnet.id != *primary && subnet_is_usable(subnet, primary, cluster))
}

/// Subnets that pods must not use.
pub fn excluded_subnets(subnets: &[Subnet]) -> BTreeSet<SubnetId> {
    subnets.iter().filter(|subnet| is_excluded(subnet)).map(|subnet| subnet.id.clone()).collect()
}

fn is_excluded(subnet: &Subnet) -> bool {
    subnet.tags.get(TAG_SUBNET_ROLE).is_some_and(|role| role == "0")
}

fn subnet_is_usable(subnet: &Subnet, primary: &SubnetId, cluster: &str) -> bool {
    let tagged = subnet.tags.contains_key(TAG_SUBNET_ROLE);
    let of_clusters: Vec<_> = subnet.tags.keys().filter_map(|key| key.strip_prefix(TAG_SUBNET_CLUSTER)).collect();
    !is_excluded(subnet) && (tagged || subnet.id == *primary) && (of_clusters.is_empty() || of_clusters.contains(&cluster))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Attachment;
    use crate::ids::{EniId, Mac};
    use crate::objects::{EniConfigSpec, Meta};

    const PRIMARY: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const NOW: Time = Time(1_700_000_600_000);

    fn identity() -> InstanceIdentity {
        InstanceIdentity {
            instance: InstanceId::from("i-1"),
            instance_type: "p4d.24xlarge".to_owned(),
            region: "eu-west-1".to_owned(),
            availability_zone: "eu-west-1a".to_owned(),
            primary_mac: PRIMARY,
            local_ipv4: None,
            ipv6: None,
            auto_scaling_group: None,
        }
    }

    /// An ENI of card 0 and device 1 that was made for this instance.
    fn eni() -> Eni {
        Eni {
            id: EniId::new("eni-1".to_owned()),
            mac: OTHER,
            kind: EniKind::Interface,
            subnet: SubnetId::from("subnet-a"),
            vpc: "vpc-1".into(),
            status: "in-use".to_owned(),
            description: "aws-K8S-i-1".to_owned(),
            primary_ipv4: Some([10, 0, 0, 4].into()),
            secondary_ipv4: vec![[10, 0, 0, 5].into()],
            prefixes_v4: Vec::new(),
            ipv6: Vec::new(),
            prefixes_v6: Vec::new(),
            security_groups: Vec::new(),
            attachment: Some(Attachment {
                id: "eni-attach-1".into(),
                instance: InstanceId::from("i-1"),
                device_index: 1,
                network_card: 0,
                delete_on_termination: true,
            }),
            connection_tracking: None,
            tags: BTreeMap::from([(TAG_INSTANCE.to_owned(), "i-1".to_owned())]),
        }
    }

    fn shown(eni: &Eni) -> ImdsEni {
        ImdsEni {
            mac: eni.mac,
            id: eni.id.clone(),
            device_index: 1,
            network_card: 0,
            subnet: eni.subnet.clone(),
            subnet_cidr: None,
            subnet_ipv6_cidrs: Vec::new(),
            vpc: eni.vpc.clone(),
            security_groups: Vec::new(),
            local_ipv4s: eni.primary_ipv4.into_iter().chain(eni.secondary_ipv4.clone()).collect(),
            prefixes_v4: Vec::new(),
            ipv6s: Vec::new(),
            prefixes_v6: Vec::new(),
        }
    }

    fn tagged(tags: &[(&str, &str)]) -> Eni {
        Eni { tags: tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(), ..eni() }
    }

    #[test]
    fn pods_get_addresses_of_enis_that_are_ours_and_of_no_other() {
        let identity = identity();
        let excluded = BTreeSet::from([SubnetId::from("subnet-x")]);
        let ours = Adoption {
            identity: &identity,
            custom_networking: false,
            manage_untagged: false,
            cards: &[(0, 4), (1, 4)],
            excluded_subnets: &excluded,
            given_out: None,
            slots: 9,
            now: NOW,
        };
        let untagged_too = Adoption { manage_untagged: true, ..ours.clone() };
        let custom = Adoption { custom_networking: true, ..ours.clone() };
        let card = |network_card| {
            let attachment = eni().attachment.map(|attachment| Attachment { network_card, ..attachment });
            Eni { attachment, ..eni() }
        };
        let kind = |kind| Eni { kind, ..eni() };
        let primary = Eni { mac: PRIMARY, tags: BTreeMap::new(), ..eni() };
        let in_excluded = |eni: Eni| Eni { subnet: SubnetId::from("subnet-x"), ..eni };
        for (adoption, eni, role) in [
            (&ours, eni(), EniRole::Pods),
            (&ours, primary.clone(), EniRole::Pods),
            (&custom, primary.clone(), EniRole::PrimaryOfCustomNetworking),
            (&ours, in_excluded(primary), EniRole::ExcludedSubnet),
            (&ours, in_excluded(eni()), EniRole::ExcludedSubnet),
            (&ours, tagged(&[]), EniRole::Unmanaged),
            (&ours, tagged(&[(TAG_INSTANCE, "i-2")]), EniRole::Unmanaged),
            (&untagged_too, tagged(&[]), EniRole::Pods),
            (&ours, tagged(&[(TAG_INSTANCE, "i-1"), (TAG_NO_MANAGE, "true")]), EniRole::Unmanaged),
            (&untagged_too, tagged(&[(TAG_NO_MANAGE, "true")]), EniRole::Unmanaged),
            (&ours, tagged(&[(TAG_INSTANCE, "i-1"), (TAG_NO_MANAGE, "false")]), EniRole::Pods),
            (&ours, kind(EniKind::EfaOnly), EniRole::EfaOnly),
            (&ours, kind(EniKind::Branch), EniRole::Unmanaged),
            (&ours, kind(EniKind::Other), EniRole::Unmanaged),
            // The VPC resource controller makes the trunk, and tags it as it likes.
            (&ours, Eni { kind: EniKind::Trunk, ..tagged(&[]) }, EniRole::Trunk),
            (&ours, Eni { kind: EniKind::Trunk, ..tagged(&[(TAG_NO_MANAGE, "true")]) }, EniRole::Unmanaged),
            (&ours, card(1), EniRole::Pods),
            (&ours, card(2), EniRole::OtherCard),
        ] {
            assert_eq!(adoption.role(None, Some(&eni)), role, "by EC2: {eni:?}");
            let imds = ImdsEni { network_card: eni.attachment.as_ref().map_or(0, |attachment| attachment.network_card), ..shown(&eni) };
            assert_eq!(adoption.role(Some(&imds), Some(&eni)), role, "by both: {eni:?}");
        }
        // Where EC2 has not told yet, only an ENI whose addresses were given out.
        let imds = shown(&eni());
        for (given, role) in [(vec![[10, 0, 0, 5]], EniRole::Pods), (vec![[10, 0, 0, 4], [10, 0, 0, 6]], EniRole::Unconfirmed)] {
            let given: BTreeSet<IpAddr> = given.into_iter().map(IpAddr::from).collect();
            let unsure = Adoption { given_out: Some(&given), ..ours.clone() };
            assert_eq!(unsure.role(Some(&imds), None), role, "{given:?}");
            assert_eq!(unsure.role(Some(&imds), Some(&eni())), EniRole::Pods);
            assert_eq!(unsure.role(Some(&ImdsEni { mac: PRIMARY, ..imds.clone() }), None), EniRole::Pods);
        }
        // Where EC2 is never asked, an ENI without any address is EFA's.
        assert_eq!(ours.role(Some(&imds), None), EniRole::Pods);
        assert_eq!(ours.role(Some(&ImdsEni { local_ipv4s: Vec::new(), ..imds.clone() }), None), EniRole::EfaOnly);
        assert_eq!(ours.role(Some(&ImdsEni { subnet: SubnetId::from("subnet-x"), ..imds }), None), EniRole::ExcludedSubnet);
    }

    #[test]
    fn what_ec2_says_of_addresses_outweighs_imds_and_an_enis_own_is_never_a_pods() {
        let identity = identity();
        let adoption = Adoption {
            identity: &identity,
            custom_networking: false,
            manage_untagged: false,
            cards: &[(0, 4)],
            excluded_subnets: &BTreeSet::new(),
            given_out: None,
            slots: 9,
            now: NOW,
        };
        let addresses = |imds: Option<&ImdsEni>, ec2: Option<&Eni>| {
            adoption.record(imds, ec2, None).map(|record| record.cidrs.keys().map(ToString::to_string).collect::<Vec<_>>())
        };
        let stale = ImdsEni { local_ipv4s: vec![[10, 0, 0, 4].into(), [10, 0, 0, 6].into()], ..shown(&eni()) };
        assert_eq!(addresses(Some(&stale), Some(&eni())).unwrap(), ["10.0.0.5/32"]);
        assert_eq!(addresses(Some(&stale), None).unwrap(), ["10.0.0.6/32"]);
        let own_twice = Eni { secondary_ipv4: vec![[10, 0, 0, 4].into(), [10, 0, 0, 5].into()], ..eni() };
        assert_eq!(addresses(None, Some(&own_twice)).unwrap(), ["10.0.0.5/32"]);
        assert_eq!(addresses(None, Some(&Eni { attachment: None, ..eni() })), None, "attached nowhere");
        assert_eq!(addresses(None, None), None);
    }

    #[test]
    fn the_primary_eni_is_the_one_that_imds_names_wherever_it_is_attached() {
        let identity = identity();
        let adoption = Adoption {
            identity: &identity,
            custom_networking: false,
            manage_untagged: true,
            cards: &[(0, 4)],
            excluded_subnets: &BTreeSet::new(),
            given_out: None,
            slots: 9,
            now: NOW,
        };
        let primary = Eni { mac: PRIMARY, ..eni() };
        for (imds, ec2) in [(Some(shown(&primary)), None), (Some(shown(&primary)), Some(&primary)), (None, Some(&primary))] {
            let record = adoption.record(imds.as_ref(), ec2, None).unwrap();
            assert!(record.is_primary(), "{record:?}");
            assert_eq!((record.device_index, record.attached_at, record.route_table), (0, 1, 254));
        }
        let second = adoption.record(None, Some(&eni()), None).unwrap();
        assert_eq!((second.is_primary(), second.device_index, second.attached_at), (false, 1, 1));
    }

    #[test]
    fn only_what_was_surely_left_behind_is_deleted() {
        let available = |tags: &[(&str, &str)]| Eni { attachment: None, status: "available".to_owned(), ..tagged(tags) };
        let other = (TAG_INSTANCE, "i-2");
        let own = InstanceId::from("i-1");
        // NOW is 22:23:20.
        for (eni, in_hand, leak) in [
            (available(&[(TAG_INSTANCE, "i-1")]), false, Leak::Delete),
            (available(&[(TAG_INSTANCE, "i-1")]), true, Leak::Leave),
            (available(&[other, (TAG_CREATED, "2023-11-14T22:18:19Z")]), false, Leak::Delete),
            (available(&[other, (TAG_CREATED, "2023-11-14T22:18:20Z")]), false, Leak::Leave),
            (available(&[other, (TAG_CREATED, "2023-11-14T22:30:00Z")]), false, Leak::Leave),
            (available(&[other, (TAG_CREATED, "yesterday")]), false, Leak::TagAge),
            (available(&[other, (TAG_CREATED, "1960-01-01T00:00:00Z")]), false, Leak::TagAge),
            (available(&[other]), false, Leak::TagAge),
            (Eni { description: "a person's".to_owned(), ..available(&[(TAG_INSTANCE, "i-1")]) }, false, Leak::Leave),
            (Eni { status: "in-use".to_owned(), ..available(&[(TAG_INSTANCE, "i-1")]) }, false, Leak::Leave),
            (Eni { status: "available".to_owned(), ..eni() }, false, Leak::Leave),
        ] {
            assert_eq!(judge_leak(&eni, &own, in_hand, NOW), leak, "in hand: {in_hand}, {eni:?}");
        }
    }

    fn subnet(id: &str, free: u32, tags: &[(&str, &str)]) -> Subnet {
        Subnet {
            id: SubnetId::from(id),
            vpc: "vpc-1".into(),
            availability_zone: "eu-west-1a".to_owned(),
            cidr: "10.0.0.0/24".parse().unwrap(),
            ipv6_cidrs: Vec::new(),
            available_addresses: free,
            tags: tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        }
    }

    #[test]
    fn new_enis_go_where_tags_let_them() {
        let primary = SubnetId::from("p");
        let of = |cluster: &str| format!("{TAG_SUBNET_CLUSTER}{cluster}");
        let chosen = |subnets: &[Subnet], discovery| match place_by_discovery(subnets, &primary, "mine", discovery, &[]) {
            Placement::Subnets { subnets, .. } => subnets.iter().map(|subnet| subnet.as_str().to_owned()).collect(),
            Placement::Nowhere(why) => vec![why],
        };
        let all = [
            subnet("p", 10, &[]),
            subnet("untagged", 500, &[]),
            subnet("role", 100, &[(TAG_SUBNET_ROLE, "1")]),
            subnet("excluded", 200, &[(TAG_SUBNET_ROLE, "0")]),
            subnet("mine", 50, &[(TAG_SUBNET_ROLE, "1"), (&of("mine"), "shared"), (&of("theirs"), "shared")]),
            subnet("theirs", 300, &[(TAG_SUBNET_ROLE, "1"), (&of("theirs"), "owned")]),
        ];
        assert_eq!(chosen(&all, true), ["role", "mine", "p"]);
        assert_eq!(chosen(&all, false), ["p"]);
        assert!(finds_other_subnets(&all, &primary, "mine") && !finds_other_subnets(&all[..2], &primary, "mine"));
        assert_eq!(chosen(&[], true), ["p"]);
        assert_eq!(chosen(&[subnet("p", 10, &[(TAG_SUBNET_ROLE, "0")])], true), ["every subnet of the zone is excluded by its tags"]);
        assert_eq!(excluded_subnets(&all), BTreeSet::from([SubnetId::from("excluded")]));
    }

    #[test]
    fn enis_in_discovered_subnets_have_the_groups_that_are_tagged_for_pods() {
        let group = |id: &str| SecurityGroupId::from(id);
        let (primary, tagged) = ([group("sg-node")], [group("sg-pods")]);
        let (node, other) = (SubnetId::from("p"), SubnetId::from("b"));
        for (subnet, told, wanted) in [
            (&node, None, Some(&primary[..])),
            (&node, Some(&tagged[..]), Some(&primary[..])),
            (&other, Some(&tagged[..]), Some(&tagged[..])),
            (&other, Some(&[][..]), Some(&primary[..])),
            (&other, None, None),
        ] {
            assert_eq!(groups_in(subnet, &node, &primary, told), wanted, "{subnet} {told:?}");
        }
        let eni = |index, subnet: &str, groups: &[&str]| StoredEni {
            security_groups: groups.iter().map(|id| group(id)).collect(),
            ..super::super::store::tests_support::stored_eni(index, subnet, 9)
        };
        let enis = [eni(0, "p", &["sg-x"]), eni(1, "p", &["sg-pods"]), eni(2, "b", &["sg-pods"]), eni(3, "b", &["sg-node"])];
        let differ = |told| {
            let wanted = |subnet: &SubnetId| groups_in(subnet, &node, &primary, told);
            enis_with_other_groups(enis.iter(), wanted)
                .into_iter()
                .map(|(eni, groups)| (eni.device_index, groups[0].as_str()))
                .collect::<Vec<_>>()
        };
        assert_eq!(differ(Some(&tagged[..])), [(1, "sg-node"), (3, "sg-pods")]);
        assert_eq!(differ(Some(&[][..])), [(1, "sg-node"), (2, "sg-node")]);
        assert_eq!(differ(None), [(1, "sg-node")], "nobody knows what those elsewhere shall have");
    }

    #[test]
    fn an_eni_config_that_is_not_there_or_says_nothing_makes_no_eni() {
        let node = |labels: &[(&str, &str)], annotations: &[(&str, &str)]| {
            let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            Node { metadata: Meta { labels: owned(labels), annotations: owned(annotations), ..Meta::default() }, ..Node::default() }
        };
        let external = ("vpc.amazonaws.com/externalEniConfig", "external");
        for (node, name) in [
            (node(&[external, ("zone", "label")], &[("a", "annotation")]), "external"),
            (node(&[("zone", "label")], &[("a", "annotation")]), "annotation"),
            (node(&[("zone", "label")], &[]), "label"),
            (node(&[], &[]), "default"),
        ] {
            assert_eq!(eni_config_name(&node, "a", "zone"), name);
        }
        let config = |subnet: &str, groups: &[&str]| EniConfig {
            spec: EniConfigSpec { subnet: subnet.to_owned(), security_groups: groups.iter().map(|group| (*group).to_owned()).collect() },
            ..EniConfig::default()
        };
        let primary = [SecurityGroupId::from("sg-p")];
        let place = |config: Option<&EniConfig>| place_by_eni_config("c", config, &primary);
        let of = |groups: &[&str]| Placement::Subnets {
            subnets: vec![SubnetId::from("s")],
            security_groups: groups.iter().map(|group| SecurityGroupId::from(*group)).collect(),
        };
        assert!(matches!(place(None), Placement::Nowhere(why) if why.contains("\"c\", which does not exist")));
        assert!(matches!(place(Some(&config("", &["sg-1"]))), Placement::Nowhere(why) if why.contains("names no subnet")));
        assert_eq!(place(Some(&config("s", &[]))), of(&["sg-p"]));
        assert_eq!(place(Some(&config("s", &["sg-2", "sg-1"]))), of(&["sg-1", "sg-2"]));
    }
}
