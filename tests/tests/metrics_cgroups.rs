//! Real load in real cgroups: what the collector tells is what the kernel says.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stanchion_core::metrics::insights::NodeIdentity;
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::telemetry::{Collector, Roots, TelemetrySettings};
use stanchion_lab::pod_cgroups::PodCgroups;

const MIB: u64 = 1 << 20;

/// A shell that waits on its input before it begins, so that it can be moved first.
struct Load(Child);

impl Load {
    fn start(script: &str) -> Self {
        let script = format!("read go; {script}");
        Self(Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sh starts"))
    }

    fn go(&mut self) {
        use std::io::Write as _;
        self.0.stdin.as_mut().expect("piped").write_all(b"go\n").expect("the shell reads");
    }

    /// Waits until it says something.
    fn ready(&mut self) {
        let mut byte = [0];
        self.0.stdout.as_mut().expect("piped").read_exact(&mut byte).expect("the shell writes");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn collector(cgroups: &PodCgroups) -> (Collector, ClusterHandle) {
    let cluster = ClusterHandle::fixed(cgroups.cluster());
    let identity = NodeIdentity { cluster: "c".into(), node: "node1".into(), ..NodeIdentity::default() };
    let roots = Roots { cgroup: cgroups.root.path().to_owned(), ..Roots::default() };
    (Collector::new(roots, cluster.watch(), identity, &TelemetrySettings::default()), cluster)
}

/// CPU time in nanoseconds as the kernel counts it for the process itself.
fn process_cpu(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/schedstat")).expect("the process lives");
    text.split(' ').next().and_then(|word| word.parse().ok()).expect("nanoseconds on the processor")
}

#[test]
fn cpu_of_a_busy_container_is_what_the_scheduler_gave_it() {
    busy_and_idle(&PodCgroups::make("node1", 2, 1).expect("cgroups need root"));
}

#[test]
fn cpu_of_a_busy_container_is_what_the_scheduler_gave_it_by_the_v2_tree() {
    busy_and_idle(&PodCgroups::make_with_v2_cpu("node1", 2, 1).expect("needs root and a cgroup2 mount, /sys/fs/cgroup/unified beside v1"));
}

fn busy_and_idle(cgroups: &PodCgroups) {
    let mut load = Load::start("while :; do :; done");
    let process = load.0.id();
    cgroups.enter(0, 0, process).expect("the process moves");
    load.go();
    let (mut collector, _cluster) = collector(cgroups);
    let (first, used) = (Instant::now(), process_cpu(process));
    collector.collect().expect("/proc is readable");
    // Work for the scheduler to give out: until it gave some, however busy the machine is.
    let deadline = Instant::now() + Duration::from_secs(60);
    while process_cpu(process) < used + 300_000_000 {
        assert!(Instant::now() < deadline, "the load never ran");
        std::thread::yield_now();
    }
    let (snapshot, documents) = collector.collect().expect("/proc is readable");
    let (given, elapsed) = (process_cpu(process) - used, first.elapsed());
    let expected = given as f64 / elapsed.as_nanos() as f64 * 1000.0;
    let busy = snapshot.pods[0].containers[0].cpu.expect("second pass");
    let pod = snapshot.pods[0].cpu.expect("second pass");
    assert!((busy.total - expected).abs() < expected * 0.15 + 5.0, "told {} millicores, the scheduler gave {expected}", busy.total);
    assert!((pod.total - busy.total).abs() < busy.total * 0.15 + 5.0, "the pod has only this container");
    assert!(busy.user + busy.system <= busy.total * 1.3 + 50.0);
    let idle = snapshot.pods[1].containers[0].cpu.expect("second pass");
    assert!(idle.total < 1.0, "{idle:?}");
    let told = documents.iter().find(|text| text.contains("\"Type\":\"Container\"") && text.contains("pod-0")).expect("its document");
    assert!(told.contains("\"container_cpu_usage_total\":"), "{told}");
}

#[test]
fn memory_of_a_container_is_what_it_holds() {
    let cgroups = PodCgroups::make("node1", 1, 1).expect("cgroups need root");
    let (mut collector, _cluster) = collector(&cgroups);
    // dd's buffer is anonymous memory of the given size, held while it blocks on its full pipe.
    let mut load = Load::start("exec dd if=/dev/zero bs=64M count=1000 2>/dev/null");
    cgroups.enter(0, 0, load.0.id()).expect("the process moves");
    load.go();
    load.ready();
    let (snapshot, _) = collector.collect().expect("/proc is readable");
    let memory = snapshot.pods[0].containers[0].memory.expect("the kernel tells");
    assert!(memory.rss >= 60 * MIB && memory.rss < 80 * MIB, "{memory:?}");
    assert!(memory.working_set >= memory.rss && memory.usage >= memory.working_set, "{memory:?}");
    assert!(memory.max_usage >= memory.usage || memory.max_usage == 0, "{memory:?}");
    let pod = snapshot.pods[0].memory.expect("the kernel tells");
    assert!(pod.usage >= memory.usage, "the pod holds what its container holds: {pod:?}");
    drop(load);
    let (after, _) = collector.collect().expect("/proc is readable");
    assert!(after.pods[0].containers[0].memory.expect("still there").rss < 8 * MIB);
}

/// The number of directories is the same before and after, so nothing but the one that is gone tells of the one that came.
#[test]
fn a_container_that_took_anothers_place_between_two_ticks_is_seen() {
    let mut cgroups = PodCgroups::make("node1", 1, 2).expect("cgroups need root");
    let mut state = cgroups.cluster();
    // The second cgroup is the pod's sandbox: no status names it.
    let mut pod = cgroups.pods[0].clone();
    pod.status.container_statuses.truncate(1);
    pod.spec.containers.truncate(1);
    state.pods.insert(pod.full_name(), std::sync::Arc::new(pod.clone()));
    let (sender, cluster) = ClusterHandle::channel(state.clone());
    let identity = NodeIdentity { cluster: "c".into(), node: "node1".into(), ..NodeIdentity::default() };
    let roots = Roots { cgroup: cgroups.root.path().to_owned(), ..Roots::default() };
    let mut collector = Collector::new(roots, cluster.watch(), identity, &TelemetrySettings::default());
    let (snapshot, _) = collector.collect().expect("/proc is readable");
    assert_eq!(snapshot.pods[0].containers.len(), 1, "the container, not the sandbox");
    for round in 1..=2 {
        let id = format!("{:064x}", 0xb000 + round);
        cgroups.replace(0, 0, &id).expect("an empty cgroup may go");
        pod.status.container_statuses[0].container_id = format!("containerd://{id}");
        state.pods.insert(pod.full_name(), std::sync::Arc::new(pod.clone()));
        sender.send_replace(std::sync::Arc::new(state.clone()));
        let (snapshot, _) = collector.collect().expect("/proc is readable");
        assert_eq!(snapshot.pods[0].containers.len(), 1, "round {round}: the one that came");
        assert!(snapshot.pods[0].containers[0].memory.is_some());
    }
}

#[test]
fn a_container_that_is_restarted_makes_no_spike() {
    let cgroups = PodCgroups::make("node1", 1, 2).expect("cgroups need root");
    let mut state = cgroups.cluster();
    let (sender, cluster) = ClusterHandle::channel(state.clone());
    let identity = NodeIdentity { cluster: "c".into(), node: "node1".into(), ..NodeIdentity::default() };
    let roots = Roots { cgroup: cgroups.root.path().to_owned(), ..Roots::default() };
    let mut collector = Collector::new(roots, cluster.watch(), identity, &TelemetrySettings::default());
    collector.collect().expect("/proc is readable");
    // The second cgroup takes the place of the first container: a new id, one restart.
    let mut pod = cgroups.pods[0].clone();
    pod.status.container_statuses[0].container_id = cgroups.pods[0].status.container_statuses[1].container_id.clone();
    pod.status.container_statuses[0].restart_count = 1;
    pod.status.container_statuses.truncate(1);
    pod.spec.containers.truncate(1);
    state.pods.insert(pod.full_name(), std::sync::Arc::new(pod));
    sender.send_replace(std::sync::Arc::new(state));
    let (snapshot, _) = collector.collect().expect("/proc is readable");
    assert_eq!((snapshot.pods[0].restarts, snapshot.pods[0].containers.len()), (1, 1));
    assert!(snapshot.pods[0].containers[0].cpu.is_none_or(|cpu| cpu.total < 1.0));
    let (snapshot, _) = collector.collect().expect("/proc is readable");
    assert_eq!(snapshot.pods[0].restarts, 0, "a restart counts once");
}
