//! The real [`HostNetwork`]: a thread that lives in one namespace and applies plans there.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use stanchion_core::network::diff::{diff, missing, wanted_sysctls};
use stanchion_core::network::nft::Ruleset;
use stanchion_core::network::{FailedOp, HostError, HostNetwork, HostObserved, HostPlan, HostReport, NetOp};
use tokio::sync::oneshot;

use crate::netns::{Netns, NetnsError};
use crate::nft::Family;
use crate::socket::{Netlink, NetlinkError};
use crate::{legacy, nft, sysctl};

/// A plan, or `None`: the last one again.
type Job = (Option<Box<HostPlan>>, oneshot::Sender<Result<Option<HostReport>, HostError>>);

/// Applies plans to the namespace in which it was created. Cheap to clone.
///
/// Its own thread, because sysctls and `nft` act on the namespace of the thread, and because netlink requests block.
#[derive(Clone, Debug)]
pub struct HostNet {
    // Unbounded, but callers wait for the answer: as many jobs as callers, and those are ipamd and the healer.
    jobs: mpsc::Sender<Job>,
}

/// Why the thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No netlink socket.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No thread.
    #[error("cannot start the host network thread")]
    Thread(#[source] std::io::Error),
}

// === impl HostNet ===

impl HostNet {
    /// For the calling thread's namespace, whose sysctls can be written below `sysctls`: a container's `/proc/sys` is read-only, and
    /// `/proc/sys/net` of the host mounted elsewhere is that of whoever opens it.
    ///
    /// # Errors
    /// When there is no netlink socket or thread to be had.
    pub fn open(sysctls: PathBuf) -> Result<Self, OpenError> {
        // A new thread is in the namespace of the one that starts it: entering would need CAP_SYS_ADMIN for nothing.
        Self::start(Netlink::open()?, sysctls, || Ok(()))
    }

    /// For `netns`.
    ///
    /// # Errors
    /// When there is no netlink socket or thread to be had.
    pub fn open_in(netns: Netns) -> Result<Self, OpenError> {
        let netlink = netns.run(Netlink::open)??;
        Self::start(netlink, PathBuf::from(sysctl::ROOT), move || netns.enter())
    }

    fn start(
        netlink: Netlink,
        sysctls: PathBuf,
        enter: impl FnOnce() -> Result<(), NetnsError> + Send + 'static,
    ) -> Result<Self, OpenError> {
        let (jobs, inbox) = mpsc::channel();
        std::thread::Builder::new()
            .name("host-network".to_owned())
            .spawn(move || {
                if let Err(error) = enter() {
                    tracing::error!(%error, "host network thread ends");
                    return;
                }
                work(netlink, &sysctls, &inbox);
            })
            .map_err(OpenError::Thread)?;
        Ok(Self { jobs })
    }
}

impl HostNet {
    /// Applies the last plan again, to undo what others did meanwhile; `None` before the first [`HostNetwork::apply`].
    ///
    /// # Errors
    /// As [`HostNetwork::apply`].
    pub async fn reapply(&self) -> Result<Option<HostReport>, HostError> {
        self.ask(None).await
    }

    async fn ask(&self, plan: Option<Box<HostPlan>>) -> Result<Option<HostReport>, HostError> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send((plan, reply)).map_err(|_| HostError::Closed)?;
        answer.await.map_err(|_| HostError::Closed)?
    }
}

impl HostNetwork for HostNet {
    async fn apply(&self, desired: &HostPlan) -> Result<HostReport, HostError> {
        let report = self.ask(Some(Box::new(desired.clone()))).await?;
        report.ok_or(HostError::Closed)
    }
}

fn work(mut netlink: Netlink, sysctls: &Path, inbox: &mpsc::Receiver<Job>) {
    let mut last = None;
    let mut memory = Memory { upstream_is_gone: false, may_have_ipv6_table: true };
    while let Ok((plan, reply)) = inbox.recv() {
        if plan.is_some() {
            last = plan;
        }
        let outcome = last.as_deref().map(|plan| apply(&mut netlink, sysctls, plan, &mut memory)).transpose();
        // Nobody waits any more: the work is done all the same, the next plan finds it done.
        let _ = reply.send(outcome);
    }
}

/// What need not be looked for again.
struct Memory {
    /// aws-node's rules do not come back by themselves, and a look for them is a process.
    upstream_is_gone: bool,
    /// Our IPv6 table exists only where the plan wanted one.
    may_have_ipv6_table: bool,
}

fn apply(netlink: &mut Netlink, sysctls: &Path, desired: &HostPlan, memory: &mut Memory) -> Result<HostReport, HostError> {
    let mut observed = observe(netlink, sysctls, desired)?;
    if !memory.upstream_is_gone {
        let lives = |address: IpAddr| observed.routes.iter().any(|route| route.dst == address.into());
        let upstream = nft::observe_upstream(lives).map_err(|error| HostError::Observe { what: "nft chains", error })?;
        match legacy::observe_upstream() {
            Ok(documents) => observed.upstream_legacy = documents,
            // Ours are put in force all the same; both translate to the same address.
            Err(error) => tracing::warn!(error, "aws-node's rules in iptables-legacy stay"),
        }
        memory.upstream_is_gone = upstream.is_none() && observed.upstream_legacy.is_empty();
        observed.upstream = upstream.unwrap_or_default();
    }
    memory.may_have_ipv6_table |= Ruleset::of_ipv6(desired).is_wanted();
    if memory.may_have_ipv6_table {
        observed.nft_ipv6 = nft::observe(Family::Ip6).map_err(|error| HostError::Observe { what: "nft ruleset of IPv6", error })?;
        memory.may_have_ipv6_table = observed.nft_ipv6.is_some() || Ruleset::of_ipv6(desired).is_wanted();
    }
    let ops = diff(desired, &observed);
    let mut report = HostReport { missing: missing(desired, &observed), ..HostReport::default() };
    // In the plan's order: runs of netlink operations go out as one batch each.
    let is_netlink = |op: &NetOp| !matches!(op, NetOp::Sysctl { .. } | NetOp::Nft { .. } | NetOp::Legacy { .. });
    for run in ops.chunk_by(|a, b| is_netlink(a) == is_netlink(b)) {
        if is_netlink(&run[0]) {
            let results = netlink.perform(run).map_err(|error| HostError::Observe { what: "answers", error: error.chain() })?;
            for (op, result) in run.iter().zip(results) {
                // Its interface went while we looked: a pod was deleted, or set up anew. The next look sees what is there then.
                if op.is_of_a_pod() && result.as_ref().is_err_and(is_of_a_gone_link) {
                    continue;
                }
                record(&mut report, op, result.map_err(|error| error.chain()));
            }
        } else {
            for op in run {
                let result = match op {
                    NetOp::Sysctl { path, value } => set(sysctls, path, value),
                    NetOp::Nft { document } => nft::apply(document),
                    NetOp::Legacy { document } => legacy::apply(document),
                    _ => Ok(()),
                };
                record(&mut report, op, result);
            }
        }
    }
    Ok(report)
}

fn set(sysctls: &Path, path: &str, value: &str) -> Result<(), String> {
    sysctl::ensure(sysctls, path, value).map_err(|error| {
        let remedy = match error.kind() {
            ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => {
                "; mount the host's /proc/sys/net writable and name its place with --sysctl-root, or set it on the host"
            }
            _ => "",
        };
        format!("{path} cannot be set to {value} in {}: {error}{remedy}", sysctls.display())
    })
}

fn is_of_a_gone_link(error: &NetlinkError) -> bool {
    matches!(error.errno(), Some(libc::ENETDOWN | libc::ENODEV | libc::ENXIO))
}

fn record(report: &mut HostReport, op: &NetOp, result: Result<(), String>) {
    match result {
        Ok(()) => report.applied.push(op.clone()),
        Err(error) => report.failed.push(FailedOp { op: op.clone(), error }),
    }
}

fn observe(netlink: &mut Netlink, sysctls: &Path, desired: &HostPlan) -> Result<HostObserved, HostError> {
    let failed = |what| move |error: NetlinkError| HostError::Observe { what, error: error.chain() };
    let mut observed = HostObserved {
        // Rules before routes before links: see HostObserved.
        rules: netlink.rules().map_err(failed("rules"))?,
        routes: netlink.routes().map_err(failed("routes"))?,
        addresses: netlink.addresses().map_err(failed("addresses"))?,
        links: netlink.links().map_err(failed("links"))?,
        ..HostObserved::default()
    };
    for (path, _) in wanted_sysctls(desired, &observed) {
        let value =
            sysctl::read(sysctls, &path).map_err(|error| HostError::Observe { what: "sysctls", error: format!("{path}: {error}") })?;
        observed.sysctls.extend(value.map(|value| (path, value)));
    }
    observed.nft = nft::observe(Family::Ip).map_err(|error| HostError::Observe { what: "nft ruleset", error })?;
    Ok(observed)
}
