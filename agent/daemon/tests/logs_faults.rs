//! Log shipping against a sink with the service's faults, on paused time: what is written arrives, however long it takes,
//! and what cannot arrive is counted.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use stanchion_core::cloud::{LogGroupSpec, LogSink, Rejected, SinkError};
use stanchion_core::cluster::ClusterState;
use stanchion_core::logs::LogBatch;
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;
use stanchion_daemon::cluster::ClusterHandle;
use stanchion_daemon::logs::{LogsHandle, LogsParts, spawn};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

type Answer = dyn Fn(u64, Duration, &LogBatch) -> Result<Rejected, SinkError> + Send + Sync;

/// The service, as strict about groups and streams as the real one.
#[derive(Clone)]
struct Service {
    state: Arc<Mutex<State>>,
    answer: Arc<Answer>,
    begun: Instant,
}

#[derive(Default)]
struct State {
    puts: u64,
    groups: BTreeSet<String>,
    streams: BTreeSet<(String, String)>,
    taken: BTreeMap<String, u32>,
}

impl Service {
    fn new(answer: impl Fn(u64, Duration, &LogBatch) -> Result<Rejected, SinkError> + Send + Sync + 'static) -> Self {
        Self { state: Arc::default(), answer: Arc::new(answer), begun: Instant::now() }
    }

    fn lines(&self) -> usize {
        self.state.lock().unwrap().taken.len()
    }

    fn twice(&self) -> u32 {
        self.state.lock().unwrap().taken.values().map(|times| times - 1).sum()
    }
}

impl LogSink for Service {
    async fn put(&self, batch: &LogBatch) -> Result<Rejected, SinkError> {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut state = self.state.lock().unwrap();
        state.puts += 1;
        let rejected = (self.answer)(state.puts, self.begun.elapsed(), batch)?;
        if !state.streams.contains(&(batch.group().to_owned(), batch.stream().to_owned())) {
            return Err(SinkError::NotFound("stream".to_owned()));
        }
        for event in batch.events() {
            *state.taken.entry(event.message).or_default() += 1;
        }
        Ok(rejected)
    }

    async fn create_group(&self, group: &str, _spec: &LogGroupSpec) -> Result<(), SinkError> {
        self.state.lock().unwrap().groups.insert(group.to_owned());
        Ok(())
    }

    async fn create_stream(&self, group: &str, stream: &str) -> Result<(), SinkError> {
        let mut state = self.state.lock().unwrap();
        if !state.groups.contains(group) {
            return Err(SinkError::NotFound("group".to_owned()));
        }
        state.streams.insert((group.to_owned(), stream.to_owned()));
        Ok(())
    }
}

struct Agent {
    handle: LogsHandle,
    task: JoinHandle<()>,
    shutdown: CancellationToken,
}

fn start(root: &Path, service: &Service) -> Agent {
    start_with(root, service, |_| {})
}

fn start_with(root: &Path, service: &Service, change: impl FnOnce(&mut LogSettings)) -> Agent {
    let shutdown = CancellationToken::new();
    let mut settings = LogSettings { age: None, ..LogSettings::new(Layout::Raw) };
    change(&mut settings);
    let (handle, task) = spawn(LogsParts {
        settings,
        sink: service.clone(),
        cluster: ClusterHandle::fixed(ClusterState { synced: true, ..ClusterState::default() }).watch(),
        node: "n".to_owned(),
        cluster_name: "c".to_owned(),
        state_dir: root.join("state"),
        log_dir: root.join("containers"),
        shutdown: shutdown.clone(),
        grace: Duration::from_secs(10),
        wall: SystemTime::now,
    });
    Agent { handle, task, shutdown }
}

/// Files of `containers` containers.
struct Pods {
    root: tempfile::TempDir,
    files: Vec<File>,
    written: usize,
    rotations: u32,
}

impl Pods {
    fn new(containers: usize) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("containers")).unwrap();
        fs::create_dir(root.path().join("state")).unwrap();
        let files = (0..containers).map(|index| File::create(root.path().join("containers").join(name(index))).unwrap()).collect();
        Self { root, files, written: 0, rotations: 0 }
    }

    fn write(&mut self, lines: usize) {
        for index in 0..self.files.len() {
            for _ in 0..lines {
                self.written += 1;
                writeln!(self.files[index], "2026-11-20T10:00:00.{:09}Z stdout F line {}", self.written, self.written).unwrap();
            }
        }
    }

    fn rotate(&mut self) {
        self.rotations += 1;
        for (index, file) in self.files.iter_mut().enumerate() {
            let live = self.root.path().join("containers").join(name(index));
            fs::rename(&live, format!("{}.20261121-{:06}", live.display(), self.rotations)).unwrap();
            *file = File::create(&live).unwrap();
        }
    }
}

fn name(index: usize) -> String {
    format!("web-{index}_shop_app-{index:064x}.log")
}

/// Waits in the paused clock.
async fn until(what: &str, within: Duration, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + within;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come true within {within:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_hour_of_outage_with_rotation_loses_nothing() {
    let hour = Duration::from_secs(3600);
    let service =
        Service::new(move |_, since, _| if since < hour { Err(SinkError::Unavailable("refused".into())) } else { Ok(Rejected::default()) });
    let mut pods = Pods::new(3);
    let agent = start(pods.root.path(), &service);
    for _ in 0..60 {
        pods.write(20);
        pods.rotate();
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    assert_eq!(service.lines(), 0);
    let snapshot = agent.handle.snapshot().await.unwrap();
    assert!(snapshot.memory_bytes <= 12 << 20, "{} bytes in memory", snapshot.memory_bytes);
    until("everything delivered", Duration::from_secs(120), || service.lines() == pods.written).await;
    assert_eq!(service.twice(), 0);
    assert!(agent.handle.counters().retries > 0);
}

#[tokio::test(start_paused = true)]
async fn a_minute_of_outage_is_drained_half_a_minute_after_it() {
    let (from, to) = (Duration::from_secs(15), Duration::from_secs(75));
    let service =
        Service::new(
            move |_, since, _| {
                if (from..to).contains(&since) { Err(SinkError::Unavailable("503".into())) } else { Ok(Rejected::default()) }
            },
        );
    let mut pods = Pods::new(4);
    let agent = start(pods.root.path(), &service);
    for second in 0..100 {
        pods.write(150);
        if second % 10 == 9 {
            pods.rotate();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        if second == 74 {
            assert!(service.lines() < pods.written / 3, "the outage was one");
        }
    }
    until("everything delivered", Duration::from_secs(5), || service.lines() == pods.written).await;
    assert_eq!(service.twice(), 0);
    drop(agent);
}

#[tokio::test(start_paused = true)]
async fn killed_in_an_outage_nothing_is_lost() {
    let minute = Duration::from_secs(60);
    let service =
        Service::new(move |_, since, _| if since < minute { Err(SinkError::Unavailable("503".into())) } else { Ok(Rejected::default()) });
    let mut pods = Pods::new(3);
    for round in 0..6 {
        let agent = start(pods.root.path(), &service);
        pods.write(40);
        tokio::time::sleep(Duration::from_secs(7 + round)).await;
        pods.rotate();
        pods.write(3);
        tokio::time::sleep(Duration::from_millis(900)).await;
        agent.task.abort();
        assert!(agent.task.await.unwrap_err().is_cancelled());
    }
    let _agent = start(pods.root.path(), &service);
    until("everything delivered", Duration::from_secs(180), || service.lines() == pods.written).await;
}

#[tokio::test(start_paused = true)]
async fn one_container_at_25_megabytes_a_second_is_kept_up_with() {
    let service = Service::new(|_, _, _| Ok(Rejected::default()));
    let mut pods = Pods::new(1);
    let _agent = start(pods.root.path(), &service);
    // 2.5 MB every tenth of a second, rotated twice.
    let line = "x".repeat(5000);
    for tick in 0..8 {
        for _ in 0..500 {
            pods.written += 1;
            writeln!(pods.files[0], "2026-11-20T10:00:00.{:09}Z stdout F {} {line}", pods.written, pods.written).unwrap();
        }
        if tick % 3 == 2 {
            pods.rotate();
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    until("everything delivered", Duration::from_secs(4), || service.lines() == pods.written).await;
    assert_eq!(service.twice(), 0);
}

#[tokio::test(start_paused = true)]
async fn quiet_containers_put_once_a_flush_at_most() {
    let service = Service::new(|_, _, _| Ok(Rejected::default()));
    let mut pods = Pods::new(100);
    let agent = start(pods.root.path(), &service);
    for _ in 0..100 {
        pods.write(1);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    until("everything delivered", Duration::from_secs(5), || service.lines() == pods.written).await;
    // A batch a second and container, and the first of each twice, as its stream was not there.
    let puts = service.state.lock().unwrap().puts;
    assert!(puts <= 100 * 13, "{puts} puts in ten seconds");
    drop(agent);
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_keeps_positions_from_being_saved_and_nothing_else() {
    let service = Service::new(|_, _, _| Ok(Rejected::default()));
    let mut pods = Pods::new(2);
    let half_written = pods.root.path().join("state/log-positions.tmp");
    std::os::unix::fs::symlink("/dev/full", &half_written).unwrap();
    let agent = start(pods.root.path(), &service);
    pods.write(50);
    until("everything delivered", Duration::from_secs(10), || service.lines() == pods.written).await;
    until("an error counted", Duration::from_secs(10), || agent.handle.counters().position_errors > 0).await;
    // There is room again: positions are saved without a further line.
    fs::remove_file(&half_written).unwrap();
    let positions = pods.root.path().join("state").join(stanchion_daemon::logs::POSITIONS_FILE);
    until("positions saved", Duration::from_secs(10), || positions.exists()).await;
    agent.task.abort();
    let _again = start(pods.root.path(), &service);
    pods.write(1);
    until("the new lines", Duration::from_secs(10), || service.lines() == pods.written).await;
    assert_eq!(service.twice(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_noisy_namespace_delays_only_itself() {
    let service = Service::new(|_, _, _| Ok(Rejected::default()));
    let pods = Pods::new(0);
    let containers = pods.root.path().join("containers");
    let open = |namespace: &str, pod: usize| File::create(containers.join(format!("p{pod}_{namespace}_app-{pod:064x}.log"))).unwrap();
    let (mut noisy, mut neighbour, mut quiet) = (open("noisy", 1), open("noisy", 2), open("calm", 3));
    let quota = stanchion_core::logs::quota::Quota { namespace: "noisy".into(), bytes_per_second: Some(100_000), lines_per_second: None };
    let agent = start_with(pods.root.path(), &service, |settings| settings.quotas = vec![quota]);
    let line = "y".repeat(1000);
    for number in 0..2000 {
        writeln!(noisy, "2026-11-20T10:00:00.{number:09}Z stdout F noisy {number} {line}").unwrap();
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    writeln!(neighbour, "2026-11-20T10:00:00.1Z stdout F neighbour").unwrap();
    writeln!(quiet, "2026-11-20T10:00:00.1Z stdout F calm").unwrap();
    let has = |text: &str| service.state.lock().unwrap().taken.contains_key(text);
    until("the calm namespace's line", Duration::from_secs(3), || has("calm")).await;
    until("the neighbour's line, in its turn", Duration::from_secs(6), || has("neighbour")).await;
    let read = agent.handle.counters().bytes_read;
    assert!(read < 1_700_000, "{read} bytes of two million in some ten seconds at a tenth of one");
    assert!(agent.handle.counters().quota_waits > 0);
    until("all of it in the end", Duration::from_secs(40), || service.lines() == 2002).await;
}

#[tokio::test(start_paused = true)]
async fn every_third_put_throttled() {
    let throttled = || SinkError::Throttled { message: "Rate exceeded".into(), retry_after: None };
    let service = Service::new(move |put, _, _| if put % 3 == 0 { Err(throttled()) } else { Ok(Rejected::default()) });
    let mut pods = Pods::new(20);
    let agent = start(pods.root.path(), &service);
    for _ in 0..10 {
        pods.write(50);
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    until("everything delivered", Duration::from_secs(300), || service.lines() == pods.written).await;
    assert_eq!(service.twice(), 0);
    assert!(agent.handle.counters().throttled > 0);
}

#[tokio::test(start_paused = true)]
async fn groups_and_streams_that_vanish_are_made_again() {
    let service = Service::new(|_, _, _| Ok(Rejected::default()));
    let mut pods = Pods::new(2);
    let _agent = start(pods.root.path(), &service);
    for _ in 0..5 {
        pods.write(10);
        until("everything delivered", Duration::from_secs(60), || service.lines() == pods.written).await;
        let mut state = service.state.lock().unwrap();
        state.groups.clear();
        state.streams.clear();
    }
    assert_eq!(service.twice(), 0);
}

#[tokio::test(start_paused = true)]
async fn missing_permission_holds_everything_back() {
    let minutes = Duration::from_secs(300);
    let service = Service::new(
        move |_, since, _| if since < minutes { Err(SinkError::Unauthorized("AccessDenied".into())) } else { Ok(Rejected::default()) },
    );
    let mut pods = Pods::new(1);
    let agent = start(pods.root.path(), &service);
    pods.write(100);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let snapshot = agent.handle.snapshot().await.unwrap();
    assert!(snapshot.files[0].last_error.as_deref().is_some_and(|error| error.contains("AccessDenied")), "{snapshot:?}");
    assert!(snapshot.files[0].lag_bytes > 0);
    until("everything delivered", Duration::from_secs(600), || service.lines() == pods.written).await;
}

#[tokio::test(start_paused = true)]
async fn a_group_that_takes_nothing_leaves_room_for_the_others() {
    let allowed = Duration::from_secs(1200);
    let service = Service::new(move |_, since, batch| {
        let denied = batch.group() == "denied" && since < allowed;
        if denied { Err(SinkError::Unauthorized("AccessDenied".into())) } else { Ok(Rejected::default()) }
    });
    let pods = Pods::new(0);
    let containers = pods.root.path().join("containers");
    let open = |namespace: &str, pod: usize| File::create(containers.join(format!("p{pod}_{namespace}_app-{pod:064x}.log"))).unwrap();
    let stamp = "2026-11-20T10:00:00.1Z stdout F";
    let text = "x".repeat(1000);
    let fill = |mut file: &File, pod: usize, lines: usize| {
        (0..lines).for_each(|line| writeln!(file, "{stamp} {pod} {line} {text}").unwrap());
    };
    let mut denied: Vec<_> = (0..3).map(|pod| open("denied", pod)).collect();
    denied.iter().enumerate().for_each(|(pod, file)| fill(file, pod, 1500));
    let agent = start_with(pods.root.path(), &service, |settings| {
        settings.group = "{namespace}".to_owned().try_into().unwrap();
        settings.compress = false;
        (settings.memory_bytes, settings.stream_bytes) = (2 << 20, 1 << 20);
    });
    tokio::time::sleep(Duration::from_secs(30)).await;
    let has = |text: &str| service.state.lock().unwrap().taken.contains_key(text);
    let mut healthy = open("ok", 100);
    writeln!(healthy, "{stamp} first").unwrap();
    until("the line of the other group", Duration::from_secs(20), || has("first")).await;
    // One of the files goes on, and further pods come.
    writeln!(denied[0], "{stamp} late").unwrap();
    for pod in 3..20 {
        denied.push(open("denied", pod));
        fill(&denied[pod], pod, 500);
        tokio::time::sleep(Duration::from_secs(15)).await;
        writeln!(healthy, "{stamp} beside {pod}").unwrap();
        until("the next line", Duration::from_secs(20), || has(&format!("beside {pod}"))).await;
    }
    let snapshot = agent.handle.snapshot().await.unwrap();
    assert!(snapshot.memory_bytes <= 3 << 20, "{} bytes in memory", snapshot.memory_bytes);
    for file in &snapshot.files {
        let size = fs::metadata(&file.path).unwrap().len();
        if file.namespace == "ok" {
            assert_eq!((file.lag_bytes, file.last_error.as_deref()), (0, None), "{file:?}");
            continue;
        }
        assert_eq!(file.lag_bytes, size, "{file:?}");
        let pod: u64 = file.pod[1..].parse().unwrap();
        // The clock of the lines that came late began at a sweep.
        let waits = (20_u64.saturating_sub(pod.max(3))) * 15;
        assert!(file.lag_seconds + 11 >= waits, "{file:?}");
        assert!(file.last_error.as_deref().is_some_and(|error| error.contains("AccessDenied")), "{file:?}");
    }
    let lines = 3 * 1500 + 17 * 500 + 1 + 18;
    until("what was denied, once it is allowed", Duration::from_secs(1500), || service.lines() == lines).await;
    assert_eq!(service.twice(), 0);
    let behind = async || agent.handle.snapshot().await.unwrap().files.iter().any(|file| file.lag_bytes > 0 || file.lag_seconds > 0);
    while behind().await {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_event_that_is_refused_is_found_dropped_and_counted() {
    let service = Service::new(|_, _, batch| {
        if batch.events().any(|event| event.message == "line 37") {
            Err(SinkError::Invalid("poison".into()))
        } else {
            Ok(Rejected::default())
        }
    });
    let mut pods = Pods::new(1);
    let agent = start(pods.root.path(), &service);
    pods.write(100);
    until("the others delivered", Duration::from_secs(60), || service.lines() == pods.written - 1).await;
    until("the batch settled", Duration::from_secs(60), || agent.handle.counters().dropped_invalid == 1).await;
    assert_eq!(service.twice(), 0);
    assert_eq!(agent.handle.counters().events_shipped, 99);
}

#[tokio::test(start_paused = true)]
async fn events_rejected_for_their_time_are_counted_and_not_sent_again() {
    let service =
        Service::new(|_, _, batch| Ok(Rejected { expired_until: Some(2), too_old_until: Some(5), too_new_from: Some(batch.len() - 1) }));
    let mut pods = Pods::new(1);
    pods.write(50);
    let agent = start(pods.root.path(), &service);
    until("the batch settled", Duration::from_secs(60), || agent.handle.counters().batches == 1).await;
    let counters = agent.handle.counters();
    let rejected = (counters.rejected_expired, counters.rejected_too_old, counters.rejected_too_new, counters.events_shipped);
    assert_eq!(rejected, (2, 3, 1, 44));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(service.state.lock().unwrap().puts, 2, "the stream was created at the first put, and no put followed");
}

#[tokio::test(start_paused = true)]
async fn stopped_and_started_across_a_rotation_everything_comes_once() {
    let service = Service::new(|_, _, _| Ok(Rejected::default()));
    let mut pods = Pods::new(4);
    for _ in 0..5 {
        let agent = start(pods.root.path(), &service);
        pods.write(25);
        tokio::time::sleep(Duration::from_secs(5)).await;
        // The last words: written just before the end.
        pods.write(5);
        agent.shutdown.cancel();
        agent.task.await.unwrap();
        assert_eq!(service.lines(), pods.written, "the grace period was long enough");
        pods.write(10);
        pods.rotate();
        pods.write(10);
    }
    let _agent = start(pods.root.path(), &service);
    until("everything delivered", Duration::from_secs(60), || service.lines() == pods.written).await;
    assert_eq!(service.twice(), 0);
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_time_nothing_is_lost_and_little_comes_twice() {
    let service = Service::new(|_, _, _| Ok(Rejected::default()));
    let mut pods = Pods::new(4);
    let mut allowed = 0;
    for round in 0..12_u64 {
        let agent = start(pods.root.path(), &service);
        for _ in 0..10 {
            pods.write(3);
            tokio::time::sleep(Duration::from_millis(350 + round * 37)).await;
        }
        if round % 3 == 0 {
            pods.rotate();
        }
        agent.task.abort();
        assert!(agent.task.await.unwrap_err().is_cancelled());
        // Positions are a second old at most, and a batch waits a second: 12 lines every 350 ms.
        allowed += 12 * 8;
    }
    let _agent = start(pods.root.path(), &service);
    until("everything delivered", Duration::from_secs(60), || service.lines() == pods.written).await;
    assert!(service.twice() <= allowed, "{} lines came twice", service.twice());
}

#[tokio::test(start_paused = true)]
async fn unusable_positions_mean_again_from_the_beginning() {
    for text in ["", "{\"version\":1,\"node\":\"n\",\"fil", "{\"version\":1,\"node\":\"other\",\"files\":[]}"] {
        let service = Service::new(|_, _, _| Ok(Rejected::default()));
        let mut pods = Pods::new(1);
        pods.write(10);
        fs::write(pods.root.path().join("state").join(stanchion_daemon::logs::POSITIONS_FILE), text).unwrap();
        let _agent = start(pods.root.path(), &service);
        until("everything delivered", Duration::from_secs(60), || service.lines() == 10).await;
    }
}
