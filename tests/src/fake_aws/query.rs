//! EC2's Query protocol: a form in, with lists as `Name.1`, `Name.2`.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use stanchion_core::cloud::{AddressRequest, ConnectionTracking, CreateEni};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId, SecurityGroupId, SubnetId};

use super::ec2::{Ec2Call, Filter, Page};
use super::faults::ApiError;

/// The version of the API that the SDK speaks.
const VERSION: &str = "2016-11-15";

/// Parameters; whichever is never asked for is unknown to the action, as EC2 says.
pub(super) struct Form {
    fields: BTreeMap<String, String>,
    used: RefCell<BTreeSet<String>>,
}

/// Reads a request's body.
pub(super) fn parse(body: &[u8]) -> Result<Ec2Call, ApiError> {
    let form = Form::new(body)?;
    let version = form.text("Version").unwrap_or_default();
    if version != VERSION {
        return Err(ApiError::bad("NoSuchVersion", format!("The requested version ({version}) of service AmazonEC2 does not exist")));
    }
    let action = form.text("Action").ok_or_else(|| ApiError::bad("MissingAction", "The request must contain the parameter Action"))?;
    let call = read(&action, &form)?;
    form.refuse_unused()?;
    Ok(call)
}

fn read(action: &str, form: &Form) -> Result<Ec2Call, ApiError> {
    let page = || Ok::<_, ApiError>(Page { max_results: form.number("MaxResults")?, next_token: form.text("NextToken") });
    let eni = || form.needed("NetworkInterfaceId").map(EniId::new);
    Ok(match action {
        "DescribeNetworkInterfaces" => Ec2Call::DescribeNetworkInterfaces {
            ids: form.list("NetworkInterfaceId").into_iter().map(EniId::new).collect(),
            filters: form.filters()?,
            page: page()?,
        },
        "DescribeSubnets" => Ec2Call::DescribeSubnets {
            ids: form.list("SubnetId").into_iter().map(SubnetId::new).collect(),
            filters: form.filters()?,
            page: page()?,
        },
        "DescribeSecurityGroups" => Ec2Call::DescribeSecurityGroups { filters: form.filters()?, page: page()? },
        "DescribeInstances" => {
            Ec2Call::DescribeInstances { ids: form.list("InstanceId").into_iter().map(InstanceId::new).collect(), page: page()? }
        }
        "DescribeInstanceTypes" => Ec2Call::DescribeInstanceTypes { types: form.list("InstanceType"), page: page()? },
        "CreateNetworkInterface" => Ec2Call::CreateNetworkInterface(CreateEni {
            client_token: form.text("ClientToken").unwrap_or_default(),
            subnet: SubnetId::new(form.needed("SubnetId")?),
            security_groups: form.list("SecurityGroupId").into_iter().map(SecurityGroupId::new).collect(),
            description: form.text("Description").unwrap_or_default(),
            tags: form.tag_specification()?,
            addresses: form.address_request()?,
            connection_tracking: form.connection_tracking()?,
        }),
        "AttachNetworkInterface" => Ec2Call::AttachNetworkInterface {
            eni: eni()?,
            instance: InstanceId::new(form.needed("InstanceId")?),
            device_index: form.number("DeviceIndex")?.ok_or_else(|| missing("DeviceIndex"))?,
            network_card: form.number("NetworkCardIndex")?.unwrap_or(0),
        },
        "ModifyNetworkInterfaceAttribute" => match form.text("Attachment.AttachmentId") {
            Some(attachment) => Ec2Call::SetDeleteOnTermination {
                eni: eni()?,
                attachment: AttachmentId::new(attachment),
                value: form.needed("Attachment.DeleteOnTermination")? == "true",
            },
            None => Ec2Call::SetSecurityGroups {
                eni: eni()?,
                groups: form.list("SecurityGroupId").into_iter().map(SecurityGroupId::new).collect(),
            },
        },
        "AssignPrivateIpAddresses" => Ec2Call::AssignPrivateIpAddresses {
            eni: eni()?,
            request: form.address_request()?.ok_or_else(|| missing("secondaryPrivateIpAddressCount"))?,
        },
        "UnassignPrivateIpAddresses" => Ec2Call::UnassignPrivateIpAddresses {
            eni: eni()?,
            addresses: form.parsed("PrivateIpAddress")?,
            prefixes: form.parsed("Ipv4Prefix")?,
        },
        "AssignIpv6Addresses" => Ec2Call::AssignIpv6Addresses {
            eni: eni()?,
            addresses: form.number("Ipv6AddressCount")?.unwrap_or(0),
            prefixes: form.number("Ipv6PrefixCount")?.unwrap_or(0),
        },
        "UnassignIpv6Addresses" => {
            Ec2Call::UnassignIpv6Addresses { eni: eni()?, addresses: form.parsed("Ipv6Addresses")?, prefixes: form.parsed("Ipv6Prefix")? }
        }
        "DetachNetworkInterface" => {
            let _force_is_the_same_here = form.text("Force");
            Ec2Call::DetachNetworkInterface { attachment: AttachmentId::new(form.needed("AttachmentId")?) }
        }
        "DeleteNetworkInterface" => Ec2Call::DeleteNetworkInterface { eni: eni()? },
        "CreateTags" => Ec2Call::CreateTags { resources: form.list("ResourceId"), tags: form.tags("Tag")? },
        other => return Err(ApiError::bad("InvalidAction", format!("The action {other} is not valid for this web service."))),
    })
}

impl Form {
    pub(super) fn new(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|_| malformed())?;
        let mut fields = BTreeMap::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').ok_or_else(malformed)?;
            if fields.insert(decode(name)?, decode(value)?).is_some() {
                return Err(malformed());
            }
        }
        Ok(Self { fields, used: RefCell::default() })
    }

    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.used.borrow_mut().insert(name.to_owned());
        self.fields.get(name).cloned()
    }

    fn needed(&self, name: &str) -> Result<String, ApiError> {
        self.text(name).filter(|text| !text.is_empty()).ok_or_else(|| missing(name))
    }

    fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>, ApiError> {
        self.text(name).map(|text| text.parse().map_err(|_| invalid(name, &text))).transpose()
    }

    fn list(&self, name: &str) -> Vec<String> {
        (1..).map_while(|n| self.text(&format!("{name}.{n}"))).collect()
    }

    fn parsed<T: FromStr>(&self, name: &str) -> Result<Vec<T>, ApiError> {
        self.list(name).into_iter().map(|text| text.parse().map_err(|_| invalid(name, &text))).collect()
    }

    fn filters(&self) -> Result<Vec<Filter>, ApiError> {
        (1..)
            .map_while(|n| self.text(&format!("Filter.{n}.Name")).map(|name| (n, name)))
            .map(|(n, name)| {
                let values = self.list(&format!("Filter.{n}.Value"));
                if values.is_empty() || values.len() > 200 {
                    return Err(invalid("Filter", &name));
                }
                Ok(Filter { name, values })
            })
            .collect()
    }

    fn tags(&self, prefix: &str) -> Result<BTreeMap<String, String>, ApiError> {
        let mut tags = BTreeMap::new();
        for n in 1.. {
            let Some(key) = self.text(&format!("{prefix}.{n}.Key")) else { break };
            let value = self.text(&format!("{prefix}.{n}.Value")).unwrap_or_default();
            if tags.insert(key.clone(), value).is_some() {
                return Err(invalid("Tag", &key));
            }
        }
        Ok(tags)
    }

    fn tag_specification(&self) -> Result<BTreeMap<String, String>, ApiError> {
        match self.text("TagSpecification.1.ResourceType").as_deref() {
            None => Ok(BTreeMap::new()),
            Some("network-interface") => self.tags("TagSpecification.1.Tag"),
            Some(other) => Err(invalid("TagSpecification.1.ResourceType", other)),
        }
    }

    fn connection_tracking(&self) -> Result<Option<ConnectionTracking>, ApiError> {
        let seconds = |name: &str| self.number(&format!("ConnectionTrackingSpecification.{name}"));
        let asked = ConnectionTracking {
            tcp_established: seconds("TcpEstablishedTimeout")?,
            udp_stream: seconds("UdpStreamTimeout")?,
            udp: seconds("UdpTimeout")?,
        };
        Ok(Some(asked).filter(|asked| *asked != ConnectionTracking::default()))
    }

    /// At most one kind: EC2 refuses a mix.
    fn address_request(&self) -> Result<Option<AddressRequest>, ApiError> {
        let mut wanted = [
            self.number("SecondaryPrivateIpAddressCount")?.map(AddressRequest::Ipv4),
            self.number("Ipv4PrefixCount")?.map(AddressRequest::Ipv4Prefixes),
            self.number("Ipv6PrefixCount")?.map(AddressRequest::Ipv6Prefixes),
        ]
        .into_iter()
        .flatten();
        let first = wanted.next();
        if wanted.next().is_some() {
            return Err(ApiError::bad("InvalidParameterCombination", "address and prefix counts cannot be combined"));
        }
        Ok(first)
    }

    fn refuse_unused(&self) -> Result<(), ApiError> {
        let used = self.used.borrow();
        match self.fields.keys().find(|name| !used.contains(*name)) {
            Some(name) => Err(ApiError::bad("UnknownParameter", format!("The parameter {name} is not recognized"))),
            None => Ok(()),
        }
    }
}

fn decode(text: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                let (high, low) = (digit(rest.next()), digit(rest.next()));
                u8::try_from(high.ok_or_else(malformed)? * 16 + low.ok_or_else(malformed)?).map_err(|_| malformed())?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| malformed())
}

fn malformed() -> ApiError {
    ApiError::bad("MalformedQueryString", "The query string contains a syntax error.")
}

fn missing(name: &str) -> ApiError {
    ApiError::bad("MissingParameter", format!("The request must contain the parameter {name}"))
}

fn invalid(name: &str, text: &str) -> ApiError {
    ApiError::bad("InvalidParameterValue", format!("Value ({text}) for parameter {name} is invalid."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_decoded_and_what_the_action_does_not_know_is_refused() {
        let call = parse(b"Action=DeleteNetworkInterface&Version=2016-11-15&NetworkInterfaceId=eni%2D1").unwrap();
        assert_eq!(call, Ec2Call::DeleteNetworkInterface { eni: "eni-1".into() });
        let code = |body: &[u8]| parse(body).unwrap_err().code;
        assert_eq!(code(b"Action=DeleteNetworkInterface&Version=2016-11-15&NetworkInterfaceId=e&X=1"), "UnknownParameter");
        assert_eq!(code(b"Action=DeleteNetworkInterface&Version=2016-11-15"), "MissingParameter");
        assert_eq!(code(b"Action=RunInstances&Version=2016-11-15"), "InvalidAction");
        assert_eq!(code(b"Action=DeleteNetworkInterface&Version=2014-01-01"), "NoSuchVersion");
        for bad in [&b"Action"[..], b"A=%", b"A=%4", b"A=%zz", b"A=\xff", b"A=1&A=2"] {
            assert_eq!(code(bad), "MalformedQueryString", "{bad:?}");
        }
    }

    #[test]
    fn counts_of_two_kinds_are_refused() {
        let body =
            b"Action=AssignPrivateIpAddresses&Version=2016-11-15&NetworkInterfaceId=e&SecondaryPrivateIpAddressCount=1&Ipv4PrefixCount=1";
        assert_eq!(parse(body).unwrap_err().code, "InvalidParameterCombination");
    }
}
