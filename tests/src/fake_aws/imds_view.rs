//! What IMDS answers for a path, from the model.

use stanchion_core::cloud::Eni;
use stanchion_core::ids::InstanceId;

use super::faults::ApiError;
use super::model::State;

/// Fields that an ENI has in IMDS as soon as it is listed; the others follow when it is complete.
const EARLY_FIELDS: [&str; 2] = ["mac", "device-number"];

impl State {
    /// The text at a path under `/latest/`, or 404.
    pub(super) fn imds(&mut self, instance: &InstanceId, path: &str) -> Result<String, ApiError> {
        let path = path.trim_start_matches("/latest/");
        if let Some(rest) = path.strip_prefix("meta-data/iam/security-credentials") {
            return self.imds_credentials(rest.trim_matches('/'));
        }
        self.imds_text(instance, path).filter(|text| !text.is_empty()).ok_or_else(|| ApiError::with_status(404, "NotFound", ""))
    }

    fn imds_text(&self, instance: &InstanceId, path: &str) -> Option<String> {
        let view = self.instances.get(instance)?;
        let enis = self.seen_by_imds(instance);
        let (primary, _) = enis.iter().find(|(eni, _)| eni.id == view.primary)?;
        let zone = &view.availability_zone;
        Some(match path {
            "meta-data/instance-id" => view.id.to_string(),
            "meta-data/instance-type" => view.limits.instance_type.clone(),
            "meta-data/placement/availability-zone" => zone.clone(),
            "meta-data/placement/region" => self.config.region.clone(),
            "meta-data/mac" => primary.mac.to_string(),
            "meta-data/local-ipv4" => primary.primary_ipv4?.to_string(),
            "meta-data/ipv6" => primary.ipv6.first()?.to_string(),
            "meta-data/local-hostname" | "meta-data/hostname" => hostname(primary, &self.config.region),
            "meta-data/network/interfaces/macs" | "meta-data/network/interfaces/macs/" => {
                lines(enis.iter().map(|(e, _)| format!("{}/", e.mac)))
            }
            "dynamic/instance-identity/document" => serde_json::json!({
                "instanceId": view.id.as_str(), "instanceType": view.limits.instance_type, "region": self.config.region,
                "availabilityZone": zone, "accountId": "123456789012", "architecture": "x86_64",
                "privateIp": primary.primary_ipv4.map(|a| a.to_string()), "version": "2017-09-30",
            })
            .to_string(),
            tag if tag.starts_with("meta-data/tags/instance/") => {
                view.tags.get(tag.trim_start_matches("meta-data/tags/instance/"))?.clone()
            }
            _ => {
                let (mac, field) = path.strip_prefix("meta-data/network/interfaces/macs/")?.split_once('/')?;
                let (eni, complete) = enis.iter().find(|(eni, _)| eni.mac.to_string() == mac)?;
                let fields = self.imds_fields(eni);
                let mut fields = fields.iter().filter(|(name, text)| !text.is_empty() && (*complete || EARLY_FIELDS.contains(name)));
                match field {
                    "" => lines(fields.map(|(name, _)| (*name).to_owned())),
                    field => fields.find(|(name, _)| *name == field)?.1.clone(),
                }
            }
        })
    }

    fn imds_fields(&self, eni: &Eni) -> Vec<(&'static str, String)> {
        let subnet = self.subnets.get(&eni.subnet).map(super::subnet::SubnetState::describe);
        let attachment = eni.attachment.as_ref();
        let card = attachment.map_or(0, |a| a.network_card);
        vec![
            ("device-number", attachment.map(|a| a.device_index.to_string()).unwrap_or_default()),
            ("interface-id", eni.id.to_string()),
            ("ipv4-prefix", lines(&eni.prefixes_v4)),
            ("ipv6-prefix", lines(&eni.prefixes_v6)),
            ("ipv6s", lines(&eni.ipv6)),
            ("local-hostname", hostname(eni, &self.config.region)),
            ("local-ipv4s", lines(eni.primary_ipv4.iter().chain(&eni.secondary_ipv4))),
            ("mac", eni.mac.to_string()),
            // Types with one card do not have the key.
            ("network-card", if card > 0 { card.to_string() } else { String::new() }),
            ("owner-id", "123456789012".to_owned()),
            ("security-group-ids", lines(&eni.security_groups)),
            ("subnet-id", eni.subnet.to_string()),
            ("subnet-ipv4-cidr-block", subnet.as_ref().map(|s| s.cidr.to_string()).unwrap_or_default()),
            ("subnet-ipv6-cidr-blocks", subnet.as_ref().map(|s| lines(&s.ipv6_cidrs)).unwrap_or_default()),
            ("vpc-id", eni.vpc.to_string()),
            ("vpc-ipv4-cidr-block", self.config.vpc_cidrs.first().map(ToString::to_string).unwrap_or_default()),
            ("vpc-ipv4-cidr-blocks", lines(&self.config.vpc_cidrs)),
            ("vpc-ipv6-cidr-blocks", lines(&self.config.vpc_ipv6_cidrs)),
        ]
    }

    fn imds_credentials(&mut self, role: &str) -> Result<String, ApiError> {
        let not_found = || ApiError::with_status(404, "NotFound", "");
        let (name, ttl) = self.instance_role.clone().ok_or_else(not_found)?;
        match role {
            "" => Ok(name),
            role if role == name => {
                let key = self.mint_key(ttl);
                Ok(serde_json::json!({
                    "Code": "Success", "LastUpdated": key.issued, "Type": "AWS-HMAC", "AccessKeyId": key.id,
                    "SecretAccessKey": key.secret, "Token": key.session_token, "Expiration": key.expiration,
                })
                .to_string())
            }
            _ => Err(not_found()),
        }
    }
}

fn hostname(eni: &Eni, region: &str) -> String {
    eni.primary_ipv4.map(|a| format!("ip-{}.{region}.compute.internal", a.to_string().replace('.', "-"))).unwrap_or_default()
}

fn lines<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join("\n")
}
