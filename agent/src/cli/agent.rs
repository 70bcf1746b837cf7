//! `stanchion agent`: the flags of the daemon.

use std::path::PathBuf;

/// The daemon.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct AgentArgs {
    /// What this process does: network (addresses, CNI, policy), telemetry (logs, metrics)
    #[arg(long, value_delimiter = ',', default_value = "network,telemetry")]
    pub(crate) roles: Vec<Role>,
    /// Ask the API server that this kubeconfig names; default: the service account
    #[arg(long, conflicts_with = "manifests")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The cluster's state as a directory of manifests instead of an API server
    #[arg(long)]
    pub(crate) manifests: Option<PathBuf>,
    /// This node's name
    #[arg(long, env = "MY_NODE_NAME")]
    pub(crate) node_name: Option<String>,
    /// Where the plugin and people ask
    #[arg(long, default_value = stanchion_proto::DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,
    /// Positions, endpoints, cool-downs
    #[arg(long, default_value = "/var/lib/stanchion")]
    pub(crate) state_dir: PathBuf,
    /// Pinned programs and maps
    #[arg(long, default_value = "/sys/fs/bpf/stanchion")]
    pub(crate) bpf_dir: PathBuf,
    /// Container logs
    #[arg(long, default_value = "/var/log/containers")]
    pub(crate) log_dir: PathBuf,
    /// The cgroup file system
    #[arg(long, default_value = "/sys/fs/cgroup")]
    pub(crate) cgroup_root: PathBuf,
    /// The proc file system of the node
    #[arg(long, default_value = "/proc")]
    pub(crate) proc_root: PathBuf,
    /// The sys file system of the node
    #[arg(long, default_value = "/sys")]
    pub(crate) sys_root: PathBuf,
    /// Where the host's sysctls can be written; `net/ipv4/...` lies below
    #[arg(long, default_value = stanchion_netlink::sysctl::ROOT)]
    pub(crate) sysctl_root: PathBuf,
    /// Where the runtime looks for network configurations; default: HOST_CNI_CONFDIR_PATH or /etc/cni/net.d
    #[arg(long)]
    pub(crate) cni_conf_dir: Option<PathBuf>,
    /// Where the runtime looks for plugins; default: HOST_CNI_BIN_PATH or /opt/cni/bin
    #[arg(long)]
    pub(crate) cni_bin_dir: Option<PathBuf>,
    /// Where metrics are served, [::] for both address families; DISABLE_METRICS turns them off
    #[arg(long, default_value = "[::]:61678")]
    pub(crate) metrics_address: std::net::SocketAddr,
}

/// A part of the agent that may run in a container of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Role {
    /// Addresses, CNI, policy.
    Network,
    /// Logs, metrics.
    Telemetry,
}
