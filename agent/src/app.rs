//! The daemon's wiring: every part is built here, once, in order.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use stanchion_aws::{AwsClients, Overrides, SdkImds};
use stanchion_core::branch::VethNames;
use stanchion_core::cloud::{Imds as _, InstanceIdentity, LogGroupSpec};
use stanchion_core::cluster::ClusterState;
use stanchion_core::config::{BranchMode, Config, FlowLogs, PolicyMode, RecordLayout, TelemetryConfig};
use stanchion_core::conflist::{Chained, FILE_NAME, Owner, PLUGIN};
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::route::Template;
use stanchion_core::logs::settings::{FLUENT_BIT_STATE, LogSettings};
use stanchion_core::metrics::catalog::{DocType, Preset};
use stanchion_core::metrics::insights::NodeIdentity;
use stanchion_core::metrics::scrape::Rules;
use stanchion_core::network::Randomize;
use stanchion_core::network::egress::{self, EgressFamily};
use stanchion_core::policy::engine::Source;
use stanchion_daemon::admin::debug::{DebugService, SetLogFilter};
use stanchion_daemon::admin::views::Views;
use stanchion_daemon::admin::{health, http, socket};
use stanchion_daemon::boot::this_boot;
use stanchion_daemon::cluster::credentials::{self, Clients};
use stanchion_daemon::cluster::own_node::{self, Marks, REGISTERS_WITHIN};
use stanchion_daemon::cluster::tell::{self, TellParts};
use stanchion_daemon::cluster::write::Writer;
use stanchion_daemon::cluster::{ClusterHandle, ManifestsDir, api_server};
use stanchion_daemon::cni::{AdoptParts, Branches, CniSettings, Told};
use stanchion_daemon::install::conflist::{self, ConflistParts};
use stanchion_daemon::ipamd::{IpamHandle, IpamdParts};
use stanchion_daemon::logs::{JsonLines, LogsParts};
use stanchion_daemon::netpol::flow_log::{self, FlowLog, FlowLogSettings};
use stanchion_daemon::netpol::{AttachMode, EnforcingMode, FlowRecords, LoadOptions, NetpolHandle, NetpolParts};
use stanchion_daemon::predecessor::Predecessor;
use stanchion_daemon::telemetry::{
    ExporterSettings, Extras, KubeletSettings, OtlpSettings, Roots, Signing, TelemetryParts, TelemetrySettings, ToSign,
};
use stanchion_daemon::{cni, ipamd, logs, netpol, telemetry};
use stanchion_netlink::{HostNet, Netlink, process};
use stanchion_proto::cni_server::CniServer;
use stanchion_proto::debug_server::DebugServer;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cli::agent::{AgentArgs, Role};
use crate::cli::ship::{self, Sink};
use crate::logging;
use crate::parts::{self, Parts};

/// Open files at most: what systemd gives a service that asks for many.
const OPEN_FILES: u64 = 524_288;
/// How long the last log lines may take after SIGTERM; below the pod's grace period of 20 s.
const GRACE: Duration = Duration::from_secs(12);
/// Of it, until log shipping saves how far it came and ends.
const LOG_GRACE: Duration = Duration::from_secs(10);
/// What is needed to know the instance.
const IMDS_REMEDY: &str = "run on an EC2 instance with IMDSv2 enabled, in the host's network (or with a hop limit of 2); \
                           AWS_EC2_METADATA_SERVICE_ENDPOINT names another address of IMDS";
/// How long a pod's ADD waits for the cluster's state after a start.
const POLICY_SYNC_WAIT: Duration = Duration::from_secs(10);

/// How often freed memory goes back to the kernel.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(20);

/// Runs the daemon until SIGTERM or SIGINT. Stopping removes nothing: pods keep network and policy.
pub(crate) fn run(args: AgentArgs) -> Result<ExitCode> {
    process::bound_heaps();
    raise_open_files();
    let config = match Config::read(&|name| std::env::var(name).ok()) {
        Ok(config) => Arc::new(config),
        Err(errors) => {
            for error in errors {
                eprintln!("stanchion agent: {error}");
            }
            // EX_USAGE
            return Ok(ExitCode::from(64));
        }
    };
    let set_log_filter = logging::init(&config.operations.log_level)?;
    let names: Vec<String> = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
    for notice in config.notices.iter().chain(&config.unknown(names.iter().map(String::as_str))) {
        warn!("{notice}");
    }
    for setting in config.settings.iter().filter(|s| s.origin != stanchion_core::config::Origin::Default) {
        info!(name = setting.name, value = setting.value, "setting");
    }
    if args.roles.contains(&Role::Network) && config.network.policy_mode != PolicyMode::None {
        // Mounting needs more than what is kept.
        netpol::ensure_bpffs(&args.bpf_dir).context("the bpf file system")?;
    }
    crate::privileges::drop_all_but_needed(&args.roles)?;
    // Two runtimes, so that a log storm cannot delay an ADD.
    let network = runtime("network", 2)?;
    let telemetry = runtime("telemetry", 2)?;
    let _until_the_end = telemetry.spawn(give_back_freed_memory());
    let outcome = network.block_on(serve(args, config, set_log_filter, &telemetry));
    telemetry.shutdown_timeout(Duration::from_secs(1));
    network.shutdown_timeout(Duration::from_secs(1));
    outcome.map(|()| ExitCode::SUCCESS)
}

/// As many open files as the container may have: log files, and cgroup files that stay open from tick to tick. What cannot be raised is
/// kept to.
fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _kept = setrlimit(Resource::RLIMIT_NOFILE, hard.min(OPEN_FILES), hard);
    }
}

/// Looks after the process's memory for as long as its runtime lives.
async fn give_back_freed_memory() {
    let mut looks = tokio::time::interval(GIVE_BACK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        process::give_back_freed_memory();
    }
}

fn runtime(name: &str, workers: usize) -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder
        .worker_threads(workers)
        .max_blocking_threads(8)
        .thread_name(name)
        .enable_all()
        .build()
        .with_context(|| format!("start the {name} runtime"))
}

async fn serve(args: AgentArgs, config: Arc<Config>, set_log_filter: SetLogFilter, telemetry_runtime: &Runtime) -> Result<()> {
    let started = SystemTime::now();
    let shutdown = CancellationToken::new();
    std::fs::create_dir_all(&args.state_dir).with_context(|| format!("make the state directory {}", args.state_dir.display()))?;
    let has = |role| args.roles.contains(&role);
    end_on_signal(shutdown.clone())?;

    // First what only a person can put right.
    let clients = match &args.manifests {
        Some(_) => None,
        None => Some(credentials::connect(args.kubeconfig.as_deref(), &config.operations.cluster_endpoint, shutdown.clone()).await?),
    };
    let imds = SdkImds::new(None).context("build the IMDS client")?;
    let Some(identity) = identity(&imds, &shutdown).await else { return Ok(()) };
    info!(instance = %identity.instance, r#type = identity.instance_type, zone = identity.availability_zone, "this is");
    let Some(node_name) = shutdown.run_until_cancelled(node_name(&args, &identity, clients.as_ref())).await else { return Ok(()) };
    let node_name = node_name?;
    let cluster = cluster(&args, &config, &node_name, clients.as_ref(), &shutdown)?;
    let overrides = Overrides {
        region: Some(identity.region.clone()),
        ec2_endpoint: Some(config.operations.ec2_endpoint.clone()).filter(|endpoint| !endpoint.is_empty()),
        ec2_timeout: Some(config.operations.http_timeout),
        ..Overrides::default()
    };
    let egress = egress_family(&config, &identity);
    let aws = AwsClients::load(overrides).await.context("build the AWS clients")?;

    let mut running = Parts::new(shutdown.clone());
    running.add("the cluster's state", tokio::spawn(until_gone(cluster.watch())));
    let served = match has(Role::Network) {
        true => shutdown.run_until_cancelled(Predecessor::beside(checkpoint_directory(&args, &config)).ended()).await,
        false => Some(false),
    };
    let Some(served) = served else { return Ok(()) };
    // It may have ended while our image came, and our own files may be here from an earlier time.
    let succeeds = served || conflist::present(&conflist_directory(&args, &config).join(FILE_NAME)) == Some(Owner::AwsNode);
    // Before the parts that write to the node's files and call EC2: of two agents only one gets it.
    let listener = socket::bind(&args.socket)?;
    let start = Start { args: &args, config: &config, node_name: &node_name, cluster: &cluster, shutdown: &shutdown };
    let (ipam, netpol) = match has(Role::Network) {
        true => start_network(&start, &aws, imds, succeeds, &mut running).await.map(|(ipam, netpol)| (Some(ipam), netpol))?,
        false => (None, None),
    };
    let (logs, metrics) = if has(Role::Telemetry) {
        let _telemetry = telemetry_runtime.enter();
        start_telemetry(&start, &identity, &aws, netpol.clone(), &mut running)?
    } else {
        (None, None)
    };
    let flow_log = match &netpol {
        Some(netpol) => match config.telemetry.flow_logs {
            FlowLogs::None => None,
            wanted => {
                let records = netpol.follow(wanted == FlowLogs::All).await;
                let _telemetry = telemetry_runtime.enter();
                Some(start_flow_log(&start, &aws, records, &mut running))
            }
        },
        None => None,
    };
    let views = Arc::new(Views {
        version: env!("CARGO_PKG_VERSION"),
        started_ms: started.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX)),
        node_name,
        roles: args.roles.iter().map(|role| format!("{role:?}").to_lowercase()).collect(),
        config: Arc::clone(&config),
        cluster,
        ipam: ipam.clone(),
        netpol: netpol.clone(),
        flow_log,
        logs,
        telemetry: metrics,
    });
    if !config.operations.disable_metrics {
        running.add("metrics HTTP", tokio::spawn(http::serve_metrics(args.metrics_address, Arc::clone(&views), shutdown.clone())));
    }
    if !config.operations.disable_introspection {
        let bind = config.operations.introspection_bind.parse();
        let bind = bind.with_context(|| format!("INTROSPECTION_BIND_ADDRESS={:?}", config.operations.introspection_bind))?;
        running.add("introspection HTTP", tokio::spawn(http::serve_introspection(bind, Arc::clone(&views), shutdown.clone())));
    }

    info!(socket = %args.socket.display(), "listening");
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let asked = Arc::clone(&views);
    running.add("health", tokio::spawn(health::follow(reporter, move || asked.ready().is_ok(), shutdown.clone())));
    let cni = ipam.map(|ipam| {
        let spool = args.socket.with_file_name("spool");
        running.add("spool", cni::spawn_spool(spool, ipam.clone(), netpol.clone(), shutdown.clone()));
        let settings = CniSettings {
            pod_mtu: config.network.pod_mtu,
            veth_prefix: config.network.veth_prefix.clone(),
            egress,
            strict_policy: config.network.policy_mode == PolicyMode::Strict,
        };
        let mut told = Told::default();
        if let Some(writer) = clients.map(Writer::new) {
            let parts = TellParts {
                writer: writer.clone(),
                config: Arc::clone(&config),
                cluster: views.cluster.clone(),
                ipam: ipam.clone(),
                netpol: netpol.clone(),
                node_name: views.node_name.clone(),
                shutdown: shutdown.clone(),
            };
            let (events, task) = tell::spawn(parts);
            running.add("telling the cluster", task);
            let alarms = match &views.telemetry {
                Some(metrics) => metrics.allowance_alarms(),
                None => {
                    let interval = config.telemetry.metrics_interval;
                    let (alarms, task) = telemetry::watch_allowances(args.sys_root.clone(), interval, shutdown.clone());
                    running.add("network allowances", task);
                    alarms
                }
            };
            // Ends with the watch.
            running.add_errand("telling of allowances", tokio::spawn(events.clone().follow_allowances(views.node_name.clone(), alarms)));
            told = Told { events: Some(events), annotator: config.pool.annotate_pod_ip.then_some(writer) };
        }
        let strict = netpol.clone().filter(|_| settings.strict_policy);
        running.add("conflist", conflist::spawn(conflist_parts(&args, &config, &views, ipam.clone(), strict, &shutdown)));
        let branches = config.pool.pod_eni.then(|| Branches {
            cluster: views.cluster.watch(),
            ipv6: config.pool.ipv6,
            strict: strict_branches(&config),
        });
        cni::CniService::new(ipam, netpol, branches, settings, told)
    });
    let connections = match &cni {
        Some(service) => cni::take_plugins(socket::root_connections(listener), service.clone()).boxed(),
        None => socket::root_connections(listener).boxed(),
    };
    let ended = shutdown.clone();
    let server = tonic::transport::Server::builder()
        .add_service(health_service)
        .add_service(DebugServer::new(DebugService { views, set_log_filter }))
        .add_optional_service(cni.map(CniServer::new))
        .serve_with_incoming_shutdown(connections, async move { ended.cancelled().await });
    parts::serve(running, server, GRACE).await?;
    info!("stopped; pods keep network and policy");
    Ok(())
}

/// Returns when nobody writes the cluster's state any more.
async fn until_gone(mut cluster: watch::Receiver<Arc<ClusterState>>) {
    while cluster.changed().await.is_ok() {}
}

/// Logs and metrics; a part that its settings turn off is absent.
type Watched = (Option<logs::LogsHandle>, Option<telemetry::TelemetryHandle>);

/// Starts the telemetry role on the current runtime.
fn start_telemetry(
    parts: &Start<'_>,
    identity: &InstanceIdentity,
    aws: &AwsClients,
    netpol: Option<NetpolHandle>,
    running: &mut Parts,
) -> Result<Watched> {
    let Start { args, config, node_name, cluster, shutdown, .. } = parts;
    let cluster_name = config.telemetry.cluster_name.clone();
    let settings = &config.telemetry;
    let logs = if settings.logs {
        let mut log_settings = LogSettings::new(match settings.record {
            RecordLayout::FluentBit => Layout::FluentBit,
            RecordLayout::Compact => Layout::Compact,
            RecordLayout::Raw => Layout::Raw,
        });
        log_settings.group =
            Template::parse(&settings.log_group).with_context(|| format!("STANCHION_LOG_GROUP={:?}", settings.log_group))?;
        log_settings.flush = settings.log_flush;
        log_settings.group_spec.retention_days = settings.log_retention_days;
        log_settings.routes = LogSettings::container_insights_routes();
        log_settings.fluent_bit_state = FLUENT_BIT_STATE.into();
        if !settings.log_config.is_empty() {
            let path = settings.log_config.as_ref();
            log_settings = ship::with_file(log_settings, path).context("STANCHION_LOG_CONFIG")?;
        }
        if let Some(journal) = &mut log_settings.journal {
            let node = [("az", &identity.availability_zone), ("ec2_instance_id", &identity.instance.to_string())];
            journal.node = node.map(|(name, value)| (name.to_owned(), value.clone())).into();
        }
        if let Some(instance) = &mut log_settings.entity {
            *instance = identity.instance.to_string();
        }
        let sink: Sink =
            settings.log_sink.parse().map_err(|remedy| anyhow::anyhow!("STANCHION_LOG_SINK={:?}: {remedy}", settings.log_sink))?;
        let (handle, task) = match sink {
            Sink::CloudWatch => logs::spawn(parts.logs(log_settings, aws.logs())),
            Sink::Stdout => logs::spawn(parts.logs(log_settings.in_order(), JsonLines::stdout())),
            Sink::File(path) => {
                let file = JsonLines::file(&path).with_context(|| format!("STANCHION_LOG_SINK: cannot append to {}", path.display()))?;
                logs::spawn(parts.logs(log_settings.in_order(), file))
            }
        };
        running.add("logs", task);
        Some(handle)
    } else {
        None
    };
    let metrics = if settings.container_insights || !config.operations.disable_metrics {
        let (handle, task) = telemetry::spawn(TelemetryParts {
            sink: Arc::new(aws.logs()),
            cluster: cluster.watch(),
            netpol,
            logs: logs.clone(),
            extras: extras(settings, args.manifests.is_some(), aws, identity)?,
            roots: Roots { proc: args.proc_root.clone(), cgroup: args.cgroup_root.clone(), sys: args.sys_root.clone() },
            identity: NodeIdentity {
                cluster: cluster_name,
                node: (*node_name).to_owned(),
                instance_id: identity.instance.to_string(),
                instance_type: identity.instance_type.clone(),
                availability_zone: identity.availability_zone.clone(),
                auto_scaling_group: identity.auto_scaling_group.clone(),
            },
            settings: TelemetrySettings {
                interval: settings.metrics_interval,
                documents: settings.container_insights,
                selection: settings.selection.clone(),
                figures: settings.figures,
                veths: VethNames { prefix: config.network.veth_prefix.clone(), strict_branches: strict_branches(config) },
                group_spec: group_spec(settings),
            },
            shutdown: (*shutdown).clone(),
        });
        running.add("metrics", task);
        Some(handle)
    } else {
        None
    };
    Ok((logs, metrics))
}

/// How groups of documents and flows are made: as those of container logs, but in the standard class, as of no other CloudWatch makes
/// metrics. A network container need not have the settings file.
fn group_spec(settings: &TelemetryConfig) -> LogGroupSpec {
    let spec = LogGroupSpec { retention_days: settings.log_retention_days, ..LogGroupSpec::default() };
    let logs = LogSettings { group_spec: spec.clone(), ..LogSettings::new(Layout::FluentBit) };
    let of_file = (!settings.log_config.is_empty()).then(|| ship::with_file(logs, settings.log_config.as_ref()).ok()).flatten();
    of_file.map_or(spec, |logs| LogGroupSpec { class: String::new(), ..logs.group_spec })
}

/// Starts the log of judged flows on the current runtime.
fn start_flow_log(parts: &Start<'_>, aws: &AwsClients, records: FlowRecords, running: &mut Parts) -> FlowLog {
    let Start { config, node_name, shutdown, .. } = parts;
    let settings = FlowLogSettings {
        group: config.telemetry.flow_log_group.replace("{cluster}", &config.telemetry.cluster_name),
        group_spec: group_spec(&config.telemetry),
        node: (*node_name).to_owned(),
    };
    let (log, task) = flow_log::spawn(records, settings, Arc::new(aws.logs()), (*shutdown).clone());
    running.add("flow log", task);
    log
}

/// What telemetry does besides the tick. Without an API server there is no service account whose word a kubelet would take: then it is
/// asked only where a URL says so.
fn extras(settings: &TelemetryConfig, manifests: bool, aws: &AwsClients, identity: &InstanceIdentity) -> Result<Extras> {
    let asked = |text: &String| (!text.is_empty()).then(|| text.clone());
    let told = settings.container_insights && !settings.selection.without_types.contains(&DocType::ContainerFS);
    let kubelet = (settings.kubelet && told && !(manifests && settings.kubelet_url.is_empty())).then(|| KubeletSettings {
        url: settings.kubelet_url.clone(),
        insecure: settings.kubelet_insecure,
        ..KubeletSettings::default()
    });
    let rules = || match asked(&settings.scrape_rules) {
        None => Ok(Rules::default()),
        Some(path) => {
            let text = std::fs::read_to_string(&path).with_context(|| format!("STANCHION_SCRAPE_RULES: read {path}"))?;
            Rules::parse(&text).with_context(|| format!("STANCHION_SCRAPE_RULES={path}"))
        }
    };
    let statsd = asked(&settings.statsd)
        .map(|address| address.parse().with_context(|| format!("STANCHION_STATSD_ADDRESS={address:?}: write it as 0.0.0.0:8125")));
    // Of such devices only the enhanced preset tells.
    let device = |doc| settings.container_insights && !settings.selection.without_types.contains(&doc);
    let exporters = ExporterSettings {
        gpus: [DocType::NodeGPU, DocType::PodGPU, DocType::ContainerGPU].into_iter().any(device),
        volumes: device(DocType::NodeEBS),
    };
    let exporters = (settings.selection.preset == Preset::Enhanced && (exporters.gpus || exporters.volumes)).then_some(exporters);
    let otlp = asked(&settings.otlp_endpoint).map(|endpoint| {
        let region = settings.otlp_sign.region(&endpoint, &identity.region);
        OtlpSettings { endpoint, sign: region.and_then(|region| signing(aws, &region)) }
    });
    Ok(Extras { kubelet, exporters, otlp, scrape: if settings.scrape { Some(rules()?) } else { None }, statsd: statsd.transpose()? })
}

/// CloudWatch takes OTLP under the name by which its metrics are asked.
const OTLP_SERVICE: &str = "monitoring";

/// Signs with the credentials of the AWS clients.
fn signing(aws: &AwsClients, region: &str) -> Option<Signing> {
    let signer = aws.signer(OTLP_SERVICE, region)?;
    Some(Signing::new(move |ToSign { url, host, body }| {
        let signer = signer.clone();
        async move { Ok(signer.headers(&url, &host, &body, SystemTime::now()).await?) }
    }))
}

/// aws-node's too.
fn checkpoint_directory<'a>(args: &'a AgentArgs, config: &'a Config) -> &'a Path {
    Path::new(&config.pool.backing_store).parent().unwrap_or(&args.state_dir)
}

/// Starts policy, then addresses: a pod must not get an address before its policy can be written.
async fn start_network(
    parts: &Start<'_>,
    aws: &AwsClients,
    imds: SdkImds,
    succeeds: bool,
    running: &mut Parts,
) -> Result<(IpamHandle, Option<NetpolHandle>)> {
    let Start { args, config, node_name, cluster, shutdown } = parts;
    let netpol = match config.network.policy_mode {
        PolicyMode::None => None,
        PolicyMode::Standard | PolicyMode::Strict => {
            let options = LoadOptions { pin_root: args.bpf_dir.clone(), flow_entries: config.network.policy_flows };
            // Written at every pod's start: beside the checkpoint, which is in memory.
            let state_dir = checkpoint_directory(args, config).to_owned();
            netpol::take_files(&args.state_dir, &state_dir)
                .with_context(|| format!("move the policy's files from {} to {}", args.state_dir.display(), state_dir.display()))?;
            let loaded = netpol::load(&options).context("load the eBPF programs")?;
            let flow_capacity = loaded.flow_capacity().context("ask for the size of the flow tables")?;
            if flow_capacity != options.flow_entries {
                info!(flow_capacity, wanted = options.flow_entries, "the flow tables keep their size until the node boots");
            }
            let (handle, task) = netpol::spawn(NetpolParts {
                flow_capacity,
                loaded,
                attach: AttachMode::Clsact,
                cluster: (*cluster).clone(),
                node_name: (*node_name).to_owned(),
                source: config.network.policy_source,
                mode: if config.network.policy_mode == PolicyMode::Strict { EnforcingMode::Strict } else { EnforcingMode::Standard },
                sync_wait: POLICY_SYNC_WAIT,
                pod_flows: config.network.policy_pod_flows,
                state_dir,
                shutdown: (*shutdown).clone(),
            })
            .context("start network policy")?;
            running.add("policy", task);
            Some(handle)
        }
    };
    let host = HostNet::open(args.sysctl_root.clone()).context("open the host's network")?;
    let mut netlink = Netlink::open().context("open netlink")?;
    if config.pool.pod_eni && !netlink.has_vlans().context("ask for VLAN interfaces")? {
        warn!(
            "ENABLE_POD_ENI=true, but this kernel has no VLAN interfaces: pods with security groups of their own cannot start here; load its module 8021q"
        );
    }
    let interfaces = netlink.links().context("list the host's links")?;
    let time_of_day = SystemTime::now();
    let (ipam, task) = ipamd::spawn(IpamdParts {
        config: Arc::clone(config),
        ec2: aws.ec2(),
        imds,
        host: host.clone(),
        checkpoint: PathBuf::from(&config.pool.backing_store),
        interfaces: interfaces.into_iter().map(|link| link.name).collect(),
        cluster: cluster.watch(),
        node_name: (*node_name).to_owned(),
        succeeds,
        shutdown: (*shutdown).clone(),
        time_of_day,
        boot: this_boot(time_of_day),
    });
    // What cannot pass by itself ends the agent: its supervisor says it to a person.
    running.add_fallible("addresses", task);
    if let Some(netpol) = &netpol {
        if config.network.policy_source == Source::Policies {
            tokio::spawn(CancellationToken::clone(shutdown).run_until_cancelled_owned(tell_of_policies_new_in_force(cluster.watch())));
        }
        let adoption = cni::spawn_adoption(AdoptParts {
            ipam: ipam.clone(),
            netpol: netpol.clone(),
            cluster: cluster.watch(),
            node_name: (*node_name).to_owned(),
            veth_prefix: config.network.veth_prefix.clone(),
            shutdown: (*shutdown).clone(),
        });
        running.add_errand("policy for running pods", adoption);
    }
    let told = ipam.clone();
    let healer = cni::spawn_heal(host, move |subject| told.healed(subject), (*shutdown).clone()).context("watch the host's network")?;
    running.add("network healer", healer);
    Ok((ipam, netpol))
}

/// The family that pods reach besides the cluster's.
fn egress_family(config: &Config, identity: &InstanceIdentity) -> Option<EgressFamily> {
    let wanted = egress::wanted(config, identity.local_ipv4, identity.ipv6, Randomize::default());
    if wanted.is_none() && config.network.v6_egress && !config.pool.ipv6 {
        warn!("ENABLE_V6_EGRESS=true, but the primary ENI has no IPv6 address: pods get no IPv6 egress; give the instance one");
    }
    wanted.map(|egress| EgressFamily::of(egress.to))
}

/// Pods with security groups of their own are in strict mode.
fn strict_branches(config: &Config) -> bool {
    config.pool.pod_eni && config.pool.branch_mode == BranchMode::Strict
}

/// What every part gets.
struct Start<'a> {
    args: &'a AgentArgs,
    config: &'a Arc<Config>,
    node_name: &'a str,
    cluster: &'a ClusterHandle,
    shutdown: &'a CancellationToken,
}

impl Start<'_> {
    fn logs<S>(&self, settings: LogSettings, sink: S) -> LogsParts<S> {
        LogsParts {
            settings,
            sink,
            cluster: self.cluster.watch(),
            node: self.node_name.to_owned(),
            cluster_name: self.config.pool.cluster_name.clone(),
            state_dir: self.args.state_dir.clone(),
            log_dir: self.args.log_dir.clone(),
            shutdown: self.shutdown.clone(),
            grace: LOG_GRACE,
            wall: SystemTime::now,
        }
    }
}

/// As the flag or MY_NODE_NAME says; else what the API server calls this machine; else what a kubelet calls it.
async fn node_name(args: &AgentArgs, identity: &InstanceIdentity, clients: Option<&Clients>) -> Result<String> {
    if let Some(given) = args.node_name.as_ref().filter(|given| !given.is_empty()) {
        return Ok(given.clone());
    }
    let hostname = hostname(&args.proc_root)?;
    let Some(clients) = clients else {
        info!(node = hostname, "MY_NODE_NAME is not set: the host's name is taken, as a kubelet does");
        return Ok(hostname);
    };
    let address = identity.local_ipv4.map(IpAddr::from).or(identity.ipv6.map(IpAddr::from));
    let client = clients.borrow().clone();
    Ok(own_node::find(&client, &Marks { hostname, instance: identity.instance.clone(), address }, REGISTERS_WITHIN).await)
}

/// The host's name in small letters.
fn hostname(proc_root: &Path) -> Result<String> {
    let host = std::fs::read_to_string(proc_root.join("sys/kernel/hostname")).unwrap_or_default().trim().to_lowercase();
    anyhow::ensure!(!host.is_empty(), "this node's name is not known: set MY_NODE_NAME or pass --node-name");
    Ok(host)
}

fn conflist_directory(args: &AgentArgs, config: &Config) -> PathBuf {
    host_directory(config, args.cni_conf_dir.as_ref(), "HOST_CNI_CONFDIR_PATH", &config.operations.cni_conf_dir, "/etc/cni/net.d")
}

/// aws-node's defaults are the mounts of its container; on the host itself the paths are the runtime's own.
fn host_directory(config: &Config, flag: Option<&PathBuf>, name: &str, setting: &str, host: &str) -> PathBuf {
    let set = config.settings.iter().any(|s| s.name == name && s.origin == stanchion_core::config::Origin::Environment);
    let mounted = set || Path::new(setting).is_dir();
    flag.cloned().unwrap_or_else(|| PathBuf::from(if mounted { setting } else { host }))
}

fn conflist_parts(
    args: &AgentArgs,
    config: &Config,
    views: &Views,
    ipam: IpamHandle,
    strict_policy: Option<NetpolHandle>,
    shutdown: &CancellationToken,
) -> ConflistParts {
    let operations = &config.operations;
    let plugin = crate::cli::install::beside_this_program(PLUGIN).ok().filter(|path| path.is_file());
    let wanted = [(config.network.bandwidth_plugin, Chained::Bandwidth), (config.network.disable_pod_v6, Chained::NoIpv6)];
    ConflistParts {
        directory: conflist_directory(args, config),
        bin_dir: host_directory(config, args.cni_bin_dir.as_ref(), "HOST_CNI_BIN_PATH", &operations.cni_bin_dir, "/opt/cni/bin"),
        plugin,
        socket: args.socket.clone(),
        log: (operations.plugin_log_file.clone(), operations.plugin_log_level.clone()),
        chained: wanted.into_iter().filter_map(|(wanted, plugin)| wanted.then_some(plugin)).collect(),
        proc_root: args.proc_root.clone(),
        ipam,
        strict_policy,
        cluster: views.cluster.clone(),
        node_name: views.node_name.clone(),
        shutdown: shutdown.clone(),
    }
}

/// On a cluster whose policies aws-node left alone, those that are there come into force with the switch: said once they are known.
async fn tell_of_policies_new_in_force(mut cluster: watch::Receiver<Arc<ClusterState>>) {
    if let Ok(state) = cluster.wait_for(|state| state.synced).await
        && let Some(notice) = state.policies_new_in_force()
    {
        warn!("{notice}");
    }
}

/// The cluster's state from the source that the flags name.
fn cluster(
    args: &AgentArgs,
    config: &Config,
    node_name: &str,
    clients: Option<&Clients>,
    shutdown: &CancellationToken,
) -> Result<ClusterHandle> {
    if let Some(directory) = &args.manifests {
        anyhow::ensure!(!config.pool.annotate_pod_ip, "ANNOTATE_POD_IP needs an API server: unset it, or use --kubeconfig");
        return ManifestsDir::spawn(directory.clone(), shutdown.clone()).context("read the manifests");
    }
    let clients = clients.context("neither manifests nor an API server")?;
    let policy = args.roles.contains(&Role::Network) && config.network.policy_mode != PolicyMode::None;
    let scope = api_server::Scope {
        node_name: node_name.to_owned(),
        policy,
        services: args.roles.contains(&Role::Telemetry) && config.telemetry.container_insights,
        policy_endpoints: policy && config.network.policy_source == Source::Endpoints,
        eni_configs: args.roles.contains(&Role::Network) && config.pool.custom_networking,
    };
    Ok(api_server::spawn(clients.clone(), &scope, shutdown.clone()))
}

/// Who this instance is; asked until IMDS answers. `None` when the agent is told to end before.
async fn identity(imds: &SdkImds, shutdown: &CancellationToken) -> Option<InstanceIdentity> {
    let mut pause = Duration::from_millis(200);
    let mut said = String::new();
    loop {
        match imds.identity().await {
            Ok(identity) => return Some(identity),
            Err(error) => {
                let error = error.to_string();
                if error != said {
                    warn!(error, remedy = IMDS_REMEDY, "this instance is not known yet; IMDS is asked until it answers");
                    said = error;
                }
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return None,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(Duration::from_secs(10));
    }
}

/// SIGTERM and SIGINT end the agent.
fn end_on_signal(shutdown: CancellationToken) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        info!(signal = name, "stopping");
        shutdown.cancel();
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_named_as_its_kubelet_names_it() {
        let proc = tempfile::tempdir().unwrap();
        assert!(hostname(proc.path()).is_err());
        std::fs::create_dir_all(proc.path().join("sys/kernel")).unwrap();
        std::fs::write(proc.path().join("sys/kernel/hostname"), "IP-10-0-1-10.ec2.internal\n").unwrap();
        assert_eq!(hostname(proc.path()).unwrap(), "ip-10-0-1-10.ec2.internal");
    }
}
