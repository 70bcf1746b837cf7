//! Performs the planner's actions on EC2, off the actor, so that no ADD or DEL waits behind a call. Chooses nothing: each
//! function does its one sequence, undoes what it began when a step fails, and says what EC2 answered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use stanchion_core::cloud::{AddressRequest, CreateEni, Ec2Action, Ec2Api, Ec2Error, Eni};
use stanchion_core::ids::{AttachmentId, EniId, InstanceId};
use stanchion_core::ipam::ec2_cidrs;
use tokio::time::sleep;

use super::meter::Meter;

/// Further tries of a step whose loss would leave something behind (a created ENI, a detached one).
const CLEAN_UP_TRIES: u32 = 8;
/// First pause between them; doubles.
const CLEAN_UP_PAUSE: Duration = Duration::from_millis(500);
/// Longest such pause.
const CLEAN_UP_LONGEST: Duration = Duration::from_secs(30);
/// Tries of a throttled step in the middle of a sequence, and the longest pause between them: about a minute in all.
const THROTTLED_TRIES: u32 = 12;
const THROTTLED_LONGEST: Duration = Duration::from_secs(8);
/// How often a create is sent again, with the same token, after no reply came.
const CREATE_TRIES: u32 = 4;

/// EC2 as the executor uses it.
#[derive(Debug)]
pub(super) struct Executor<E> {
    pub(super) ec2: Arc<E>,
    pub(super) meter: Meter,
    pub(super) instance: InstanceId,
}

impl<E> Clone for Executor<E> {
    fn clone(&self) -> Self {
        Self { ec2: Arc::clone(&self.ec2), meter: self.meter.clone(), instance: self.instance.clone() }
    }
}

/// What an action came to.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) result: Done,
    /// Each step that ended: its action, and the error if it failed. For the planner's memory.
    pub(super) steps: Steps,
}

/// What EC2 answered, in order.
pub(super) type Steps = Vec<(Ec2Action, Option<Ec2Error>)>;

/// What is different now.
#[derive(Debug)]
pub(super) enum Done {
    /// The ENI has these further CIDRs.
    Assigned { eni: EniId, cidrs: Vec<IpNet> },
    /// EC2's picture of the ENI, as ours is stale.
    Refreshed { eni: EniId, cidrs: Vec<IpNet> },
    /// A new ENI is attached.
    Attached(Box<Eni>),
    /// The CIDRs are gone.
    Unassigned { eni: EniId, cidrs: Vec<IpNet> },
    /// The ENI is detached; `deleted` is false when it had to be left for the sweep.
    Released { eni: EniId, deleted: bool },
    /// Nothing.
    Failed(Ec2Error),
}

impl Outcome {
    fn failed(error: Ec2Error, mut steps: Steps, action: Ec2Action) -> Self {
        steps.push((action, Some(error.clone())));
        Self { result: Done::Failed(error), steps }
    }
}

/// A step in the middle of a sequence: a throttled one is sent again after a pause, because undoing what went before and doing
/// it anew would cost more calls of the same throttled account. Each refusal is told to the planner's memory.
async fn unthrottled<T, F: Future<Output = Result<T, Ec2Error>>>(
    action: Ec2Action,
    steps: &mut Steps,
    call: impl Fn() -> F,
) -> Result<T, Ec2Error> {
    let mut pause = CLEAN_UP_PAUSE;
    for _ in 1..THROTTLED_TRIES {
        match call().await {
            Err(error @ Ec2Error::Throttled { .. }) => steps.push((action, Some(error))),
            other => return other,
        }
        sleep(pause).await;
        pause = (pause * 2).min(THROTTLED_LONGEST);
    }
    call().await
}

impl<E: Ec2Api> Executor<E> {
    pub(super) async fn assign(&self, eni: EniId, request: AddressRequest) -> Outcome {
        let action = match request {
            AddressRequest::Ipv6Prefixes(_) => Ec2Action::AssignIpv6Addresses,
            _ => Ec2Action::AssignPrivateIpAddresses,
        };
        match self.meter.run(action, self.ec2.assign(&eni, request)).await {
            Ok(cidrs) => Outcome { result: Done::Assigned { eni, cidrs }, steps: vec![(action, None)] },
            // It may have happened, or our picture is stale: EC2 tells what is on the ENI.
            Err(error @ (Ec2Error::NoReply { .. } | Ec2Error::AddressLimit { .. })) => match self.describe(&eni).await {
                Ok(Some(found)) => {
                    let steps = vec![(action, Some(error)), (Ec2Action::DescribeNetworkInterfaces, None)];
                    Outcome { result: Done::Refreshed { eni, cidrs: ec2_cidrs(&found) }, steps }
                }
                Ok(None) | Err(_) => Outcome::failed(error, Vec::new(), action),
            },
            Err(error) => Outcome::failed(error, Vec::new(), action),
        }
    }

    pub(super) async fn unassign(&self, eni: EniId, cidrs: Vec<IpNet>) -> Outcome {
        let action = if cidrs.iter().any(|cidr| matches!(cidr, IpNet::V6(_))) {
            Ec2Action::UnassignIpv6Addresses
        } else {
            Ec2Action::UnassignPrivateIpAddresses
        };
        match self.meter.run(action, self.ec2.unassign(&eni, &cidrs)).await {
            Ok(()) => Outcome { result: Done::Unassigned { eni, cidrs }, steps: vec![(action, None)] },
            Err(error) => Outcome::failed(error, Vec::new(), action),
        }
    }

    /// Create, attach, delete-on-termination. A failure after the create deletes the ENI again and keeps the first error.
    pub(super) async fn attach(&self, request: CreateEni, device_index: u16, network_card: u16) -> Outcome {
        let mut steps = Vec::new();
        let created = match self.create(&request).await {
            Ok(eni) => eni,
            Err(error) => return Outcome::failed(error, steps, Ec2Action::CreateNetworkInterface),
        };
        steps.push((Ec2Action::CreateNetworkInterface, None));

        let attach = || {
            let call = self.ec2.attach_eni(&created.id, &self.instance, device_index, network_card);
            self.meter.run(Ec2Action::AttachNetworkInterface, call)
        };
        let attachment = match unthrottled(Ec2Action::AttachNetworkInterface, &mut steps, attach).await {
            Ok(attachment) => attachment,
            Err(error) => match self.attachment_after(&created.id, &error).await {
                Some(attachment) => attachment,
                None => {
                    self.delete(&created.id).await;
                    return Outcome::failed(error, steps, Ec2Action::AttachNetworkInterface);
                }
            },
        };
        steps.push((Ec2Action::AttachNetworkInterface, None));

        if let Err(error) = self.set_delete_on_termination(&created.id, &attachment, &mut steps).await {
            self.detach_and_delete(&created.id, &attachment).await;
            return Outcome::failed(error, steps, Ec2Action::ModifyNetworkInterfaceAttribute);
        }
        steps.push((Ec2Action::ModifyNetworkInterfaceAttribute, None));
        let attached = Eni {
            attachment: Some(stanchion_core::cloud::Attachment {
                id: attachment,
                instance: self.instance.clone(),
                device_index,
                network_card,
                delete_on_termination: true,
            }),
            ..created
        };
        Outcome { result: Done::Attached(Box::new(attached)), steps }
    }

    /// The same token gives the same ENI, so a lost reply leaks nothing.
    async fn create(&self, request: &CreateEni) -> Result<Eni, Ec2Error> {
        let mut pause = CLEAN_UP_PAUSE;
        for _ in 1..CREATE_TRIES {
            match self.meter.run(Ec2Action::CreateNetworkInterface, self.ec2.create_eni(request)).await {
                Err(Ec2Error::NoReply { .. }) => sleep(pause).await,
                other => return other,
            }
            pause *= 2;
        }
        self.meter.run(Ec2Action::CreateNetworkInterface, self.ec2.create_eni(request)).await
    }

    /// When no reply came, EC2 may have attached it all the same.
    async fn attachment_after(&self, eni: &EniId, error: &Ec2Error) -> Option<AttachmentId> {
        if !matches!(error, Ec2Error::NoReply { .. }) {
            return None;
        }
        let found = self.describe(eni).await.ok().flatten()?;
        found.attachment.filter(|attachment| attachment.instance == self.instance).map(|attachment| attachment.id)
    }

    pub(super) async fn set_delete_on_termination(
        &self,
        eni: &EniId,
        attachment: &AttachmentId,
        steps: &mut Steps,
    ) -> Result<(), Ec2Error> {
        let call = || self.meter.run(Ec2Action::ModifyNetworkInterfaceAttribute, self.ec2.set_delete_on_termination(eni, attachment));
        match unthrottled(Ec2Action::ModifyNetworkInterfaceAttribute, steps, call).await {
            Err(Ec2Error::NoReply { .. } | Ec2Error::NotFound { .. }) => {
                sleep(CLEAN_UP_PAUSE).await;
                unthrottled(Ec2Action::ModifyNetworkInterfaceAttribute, steps, call).await
            }
            other => other,
        }
    }

    pub(super) async fn release(&self, eni: EniId, attachment: Option<AttachmentId>) -> Outcome {
        let attachment = match attachment {
            Some(attachment) => attachment,
            None => match self.describe(&eni).await {
                Ok(found) => match found.and_then(|found| found.attachment) {
                    Some(attachment) => attachment.id,
                    None => return Outcome { result: Done::Released { deleted: self.delete(&eni).await, eni }, steps: Vec::new() },
                },
                Err(error) => return Outcome::failed(error, Vec::new(), Ec2Action::DescribeNetworkInterfaces),
            },
        };
        let detached = self.meter.run(Ec2Action::DetachNetworkInterface, self.ec2.detach_eni(&attachment)).await;
        match detached {
            Ok(()) | Err(Ec2Error::NotFound { .. }) => {
                let deleted = self.delete(&eni).await;
                Outcome { result: Done::Released { eni, deleted }, steps: vec![(Ec2Action::DetachNetworkInterface, None)] }
            }
            Err(error) => Outcome::failed(error, Vec::new(), Ec2Action::DetachNetworkInterface),
        }
    }

    async fn detach_and_delete(&self, eni: &EniId, attachment: &AttachmentId) {
        let mut pause = CLEAN_UP_PAUSE;
        for _ in 0..CLEAN_UP_TRIES {
            match self.meter.run(Ec2Action::DetachNetworkInterface, self.ec2.detach_eni(attachment)).await {
                Ok(()) | Err(Ec2Error::NotFound { .. }) => break,
                Err(_) => sleep(pause).await,
            }
            pause = (pause * 2).min(CLEAN_UP_LONGEST);
        }
        self.delete(eni).await;
    }

    /// Deletes a detached ENI; EC2 refuses until the detachment is through. False leaves it to the sweep.
    pub(super) async fn delete(&self, eni: &EniId) -> bool {
        let mut pause = CLEAN_UP_PAUSE;
        for _ in 0..CLEAN_UP_TRIES {
            match self.meter.run(Ec2Action::DeleteNetworkInterface, self.ec2.delete_eni(eni)).await {
                Ok(()) | Err(Ec2Error::NotFound { .. }) => return true,
                Err(error) => tracing::debug!(%eni, %error, "ENI not deleted yet"),
            }
            sleep(pause).await;
            pause = (pause * 2).min(CLEAN_UP_LONGEST);
        }
        false
    }

    async fn describe(&self, eni: &EniId) -> Result<Option<Eni>, Ec2Error> {
        let ids = [eni.clone()];
        let found = self.meter.run(Ec2Action::DescribeNetworkInterfaces, self.ec2.describe_enis(&ids)).await?;
        Ok(found.into_iter().next())
    }

    /// Every ENI attached to this instance, as EC2 knows it.
    pub(super) async fn attached(&self) -> Result<Vec<Eni>, Ec2Error> {
        self.meter.run(Ec2Action::DescribeNetworkInterfaces, self.ec2.describe_attached(&self.instance)).await
    }

    pub(super) async fn create_tags(&self, eni: &EniId, tags: &BTreeMap<String, String>) -> Result<(), Ec2Error> {
        self.meter.run(Ec2Action::CreateTags, self.ec2.create_tags(eni, tags)).await
    }
}
