//! The tailer against a model: a runtime that writes, rotates, compresses and truncates one container's log, a sink that may
//! lag, an agent that is killed at any point. Whatever happens, every line written arrives; twice only what was not
//! remembered when the agent was killed.
#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use stanchion_core::logs::positions::Positions;
use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;
use stanchion_daemon::logs::{Now, Restored, Sealed, Tailer, TailerParts};

#[derive(Clone, Debug)]
enum Step {
    /// Complete lines.
    Write(u8),
    /// A line in two parts; the second comes with the next write.
    WriteSplit,
    /// Bytes of a line without its end; the rest comes with the next write.
    WriteTorn,
    /// The kubelet renames the file; the runtime opens a new one after writing some lines more.
    Rotate { late_lines: u8 },
    /// The kubelet compresses the oldest plain rotated file, never the newest.
    Compress,
    /// logrotate's way, when everything was read.
    CopyTruncate,
    /// The agent looks at the directory.
    Scan,
    /// The agent reads.
    Turn,
    /// Time passes.
    Wait(u16),
    /// The sink takes the oldest batch of the stream, and the agent hears of it.
    Acknowledge,
    /// Positions are saved.
    Save,
    /// The agent dies; batches handed out may have been taken all the same.
    Kill { taken: bool },
}

fn step(with_partials: bool) -> impl Strategy<Value = Step> {
    let in_parts = if with_partials { Step::WriteSplit } else { Step::WriteTorn };
    prop_oneof![
        6 => (1_u8..20).prop_map(Step::Write),
        2 => Just(in_parts),
        2 => Just(Step::WriteTorn),
        3 => (0_u8..3).prop_map(|late_lines| Step::Rotate { late_lines }),
        2 => Just(Step::Compress),
        1 => Just(Step::CopyTruncate),
        3 => Just(Step::Scan),
        6 => Just(Step::Turn),
        3 => (1_u16..7000).prop_map(Step::Wait),
        6 => Just(Step::Acknowledge),
        4 => Just(Step::Save),
        2 => any::<bool>().prop_map(|taken| Step::Kill { taken }),
    ]
}

/// The container's side.
struct Writer {
    dir: PathBuf,
    live: PathBuf,
    file: File,
    next_line: u32,
    rotations: u32,
    /// Begun and not ended: text still to be written.
    pending: Option<String>,
}

impl Writer {
    fn new(root: &Path) -> Self {
        let dir = root.join("pods/shop_web_8f3a/app");
        fs::create_dir_all(&dir).unwrap();
        fs::create_dir_all(root.join("containers")).unwrap();
        let live = dir.join("0.log");
        let file = File::options().create(true).append(true).open(&live).unwrap();
        let link = format!("web_shop_app-{}.log", "ab".repeat(32));
        std::os::unix::fs::symlink(&live, root.join("containers").join(link)).unwrap();
        Self { dir, live, file, next_line: 0, rotations: 0, pending: None }
    }

    fn put(&mut self, text: &str) {
        self.file.write_all(text.as_bytes()).unwrap();
    }

    fn stamp(&mut self) -> String {
        self.next_line += 1;
        format!("2026-11-20T10:{:02}:{:02}.{:09}Z", self.next_line / 60 % 60, self.next_line % 60, self.next_line)
    }

    fn complete(&mut self) {
        if let Some(rest) = self.pending.take() {
            self.put(&rest);
        }
    }

    fn lines(&mut self, count: u8) {
        self.complete();
        for _ in 0..count {
            let stamp = self.stamp();
            let line = format!("{stamp} stdout F line {} {}\n", self.next_line, "x".repeat((self.next_line % 50) as usize));
            self.put(&line);
        }
    }

    fn split(&mut self) {
        self.complete();
        let stamp = self.stamp();
        let number = self.next_line;
        self.put(&format!("{stamp} stdout P line \n"));
        self.pending = Some(format!("{stamp} stdout F {number} joined\n"));
    }

    fn torn(&mut self) {
        self.complete();
        let stamp = self.stamp();
        let number = self.next_line;
        self.put(&format!("{stamp} stdout F li"));
        self.pending = Some(format!("ne {number} torn\n"));
    }

    fn rotate(&mut self, late_lines: u8) {
        // The runtime writes whole lines before it opens the next file.
        self.complete();
        self.rotations += 1;
        fs::rename(&self.live, self.dir.join(format!("0.log.20261121-{:06}", self.rotations))).unwrap();
        self.lines(late_lines);
        self.file = File::options().create(true).append(true).open(&self.live).unwrap();
    }

    fn compress(&mut self) {
        let mut plain: Vec<_> = fs::read_dir(&self.dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("0.log.") && path.extension().unwrap() != "gz")
            .collect();
        plain.sort();
        plain.pop();
        let Some(oldest) = plain.first() else { return };
        let mut name = oldest.clone().into_os_string();
        name.push(".gz");
        let mut encoder = flate2::write::GzEncoder::new(File::create(name).unwrap(), flate2::Compression::fast());
        encoder.write_all(&fs::read(oldest).unwrap()).unwrap();
        encoder.finish().unwrap();
        fs::remove_file(oldest).unwrap();
    }
}

/// The agent's side and the sink.
struct World {
    root: tempfile::TempDir,
    writer: Writer,
    tailer: Tailer,
    queue: VecDeque<Sealed>,
    saved: Option<Vec<u8>>,
    mono: i64,
    /// How often each line was taken.
    taken: BTreeMap<u32, u32>,
    /// Lines taken since the last save: what a kill may send again.
    unsaved: u32,
    allowed_twice: u32,
}

fn tailer(root: &Path, saved: Option<&[u8]>) -> Tailer {
    let settings = LogSettings { age: None, ..LogSettings::new(Layout::Raw) };
    let parts = TailerParts { settings, log_dir: root.join("containers"), node: "n".to_owned(), cluster_name: "c".to_owned() };
    let restored = saved.map_or(Restored::Fresh, |text| Restored::Positions(Positions::parse(text, "n").unwrap()));
    Tailer::new(parts, restored)
}

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let writer = Writer::new(root.path());
        let tailer = tailer(root.path(), None);
        Self { root, writer, tailer, queue: VecDeque::new(), saved: None, mono: 0, taken: BTreeMap::new(), unsaved: 0, allowed_twice: 0 }
    }

    fn now(&self) -> Now {
        Now { mono: self.mono, wall: 1_795_168_801_000 + self.mono }
    }

    fn turn(&mut self) -> bool {
        let progress = self.tailer.turn(self.now()).progress;
        self.queue.extend(self.tailer.take_ready());
        progress
    }

    fn take(&mut self, sealed: &Sealed) {
        for event in sealed.batch.events() {
            let number = event.message.split(' ').nth(1).and_then(|number| number.parse().ok());
            let number = number.unwrap_or_else(|| panic!("not a line that was written: {:?}", event.message));
            *self.taken.entry(number).or_default() += 1;
            self.unsaved += 1;
        }
    }

    fn acknowledge(&mut self) -> bool {
        let Some(sealed) = self.queue.pop_front() else { return false };
        self.take(&sealed);
        self.tailer.acknowledge(sealed.id, None, self.now());
        true
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Write(count) => self.writer.lines(*count),
            Step::WriteSplit => self.writer.split(),
            Step::WriteTorn => self.writer.torn(),
            Step::Rotate { late_lines } => self.writer.rotate(*late_lines),
            Step::Compress => self.writer.compress(),
            Step::CopyTruncate => {
                // What is not read before it is lost by the nature of it: let the agent catch up first.
                self.writer.complete();
                self.tailer.scan(self.now()).unwrap();
                self.settle();
                self.writer.file.set_len(0).unwrap();
                self.mono += 1000;
                self.turn();
            }
            Step::Scan => self.tailer.scan(self.now()).unwrap(),
            Step::Turn => {
                self.turn();
            }
            Step::Wait(milliseconds) => self.mono += i64::from(*milliseconds),
            Step::Acknowledge => {
                self.acknowledge();
            }
            Step::Save => self.save(),
            Step::Kill { taken } => {
                if *taken {
                    for sealed in std::mem::take(&mut self.queue) {
                        self.take(&sealed);
                    }
                }
                self.queue.clear();
                self.allowed_twice += self.unsaved;
                self.unsaved = 0;
                self.tailer = tailer(self.root.path(), self.saved.as_deref());
            }
        }
    }

    fn save(&mut self) {
        self.saved = Some(self.tailer.positions().to_json());
        self.unsaved = 0;
    }

    /// Runs the agent until there is nothing to do.
    fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..1000 {
            let busy = self.turn() | self.acknowledge();
            // An idle file is looked at once a second, a new one after three.
            quiet = if busy || self.tailer.in_flight() > 0 || self.lag() > 0 { 0 } else { quiet + 1 };
            if quiet == 10 {
                return;
            }
            self.mono += 500;
        }
        panic!("did not settle: {:#?}", self.tailer.snapshot(self.now()));
    }

    fn lag(&self) -> u64 {
        self.tailer.snapshot(self.now()).files.iter().map(|file| file.lag_bytes).sum()
    }

    /// The kubelet has renamed the live file, which is read to its end, and the runtime does not open the next one yet.
    fn rename_alone(&mut self) -> PathBuf {
        let away = self.writer.dir.join("0.log.20261121-000009");
        fs::rename(&self.writer.live, &away).unwrap();
        for _ in 0..5 {
            self.finish();
        }
        away
    }

    fn finish(&mut self) {
        self.writer.complete();
        for _ in 0..3 {
            self.mono += 6000;
            self.tailer.scan(self.now()).unwrap();
            self.settle();
        }
    }

    fn lost(&self) -> Vec<u32> {
        (1..=self.writer.next_line).filter(|number| !self.taken.contains_key(number)).collect()
    }
}

/// Few in the daily run; `PROPTEST_CASES` for a night.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(192)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_line_is_lost_and_only_unsaved_ones_come_twice(steps in proptest::collection::vec(step(false), 1..60)) {
        let mut world = World::new();
        for step in &steps {
            world.run(step);
        }
        world.finish();
        prop_assert_eq!(world.lost(), Vec::<u32>::new());
        let twice: u32 = world.taken.values().map(|times| times - 1).sum();
        prop_assert!(twice <= world.allowed_twice, "{} lines came twice, {} were not remembered", twice, world.allowed_twice);
    }

    #[test]
    fn no_line_is_lost_with_split_lines(steps in proptest::collection::vec(step(true), 1..60)) {
        let mut world = World::new();
        for step in &steps {
            world.run(step);
        }
        world.finish();
        prop_assert_eq!(world.lost(), Vec::<u32>::new());
    }
}

#[test]
fn a_pod_deleted_far_behind_is_read_to_its_end() {
    let mut world = World::new();
    world.tailer.scan(world.now()).unwrap();
    for _ in 0..50 {
        world.writer.lines(200);
    }
    world.writer.rotate(0);
    for _ in 0..50 {
        world.writer.lines(200);
    }
    world.tailer.scan(world.now()).unwrap();
    fs::remove_dir_all(world.root.path().join("pods")).unwrap();
    fs::remove_dir_all(world.root.path().join("containers")).unwrap();
    fs::create_dir(world.root.path().join("containers")).unwrap();
    world.finish();
    assert_eq!(world.lost(), [0_u32; 0]);
    assert_eq!(world.tailer.snapshot(world.now()).files, [], "nothing of the pod is kept open");
}

#[test]
fn lines_that_remain_only_compressed_are_read_after_a_restart() {
    let mut world = World::new();
    world.tailer.scan(world.now()).unwrap();
    world.writer.lines(10);
    world.finish();
    world.save();
    world.writer.lines(10);
    for _ in 0..3 {
        world.writer.rotate(0);
        world.writer.lines(10);
        world.writer.compress();
    }
    world.run(&Step::Kill { taken: false });
    world.finish();
    assert_eq!(world.lost(), [0_u32; 0]);
    assert!(world.taken.values().all(|times| *times == 1), "what was saved does not come again: {:?}", world.taken);
}

#[test]
fn a_new_file_with_the_old_inode_number_is_read_from_its_beginning() {
    let mut world = World::new();
    world.tailer.scan(world.now()).unwrap();
    world.writer.lines(20);
    world.finish();
    world.save();
    // The agent is away; the file is replaced, on the same inode as far as the positions can tell.
    world.writer.file.set_len(0).unwrap();
    world.writer.lines(30);
    world.run(&Step::Kill { taken: false });
    world.finish();
    assert_eq!(world.lost(), [0_u32; 0]);
}

#[test]
fn a_reboot_that_numbers_devices_anew_sends_nothing_twice() {
    let mut world = World::new();
    world.tailer.scan(world.now()).unwrap();
    for _ in 0..3 {
        world.writer.lines(20);
        world.finish();
        world.writer.rotate(0);
    }
    world.writer.lines(20);
    world.finish();
    let reboot = |world: &mut World| {
        let mut positions = world.tailer.positions();
        positions.files.iter_mut().for_each(|position| position.dev ^= 0x100);
        world.saved = Some(positions.to_json());
        world.run(&Step::Kill { taken: false });
    };
    reboot(&mut world);
    world.writer.lines(5);
    world.finish();
    assert_eq!(world.lost(), [0_u32; 0]);
    assert!(world.taken.values().all(|times| *times == 1), "{:?}", world.taken);
    // Another file that has the inode number is not taken for it.
    world.writer.file.set_len(0).unwrap();
    reboot(&mut world);
    world.writer.lines(40);
    world.finish();
    assert_eq!(world.lost(), [0_u32; 0]);
}

#[test]
fn a_live_file_that_is_missing_for_long_sends_nothing_twice() {
    let mut world = World::new();
    world.tailer.scan(world.now()).unwrap();
    world.writer.lines(20);
    world.writer.rotate(0);
    world.writer.lines(20);
    world.finish();
    world.rename_alone();
    world.save();
    world.writer.file = File::options().create(true).append(true).open(&world.writer.live).unwrap();
    world.writer.lines(20);
    world.finish();
    world.run(&Step::Kill { taken: false });
    world.finish();
    assert_eq!(world.lost(), [0_u32; 0]);
    let twice = world.taken.iter().filter(|(number, times)| **number <= 40 && **times > 1).count();
    assert_eq!(twice, 0, "{:?}", world.taken);
    fs::remove_dir_all(world.root.path().join("pods")).unwrap();
    fs::remove_dir_all(world.root.path().join("containers")).unwrap();
    fs::create_dir(world.root.path().join("containers")).unwrap();
    world.finish();
    world.finish();
    assert_eq!(world.tailer.snapshot(world.now()).files, [], "nothing of the pod is kept open");
    assert_eq!(world.tailer.positions().files, []);
}

/// A runtime that is long in opening the next file writes to the renamed one meanwhile.
#[test]
fn what_is_written_to_a_renamed_file_while_there_is_no_other_is_read() {
    for (compressed, undone) in [(false, false), (true, false), (false, true)] {
        let mut world = World::new();
        world.tailer.scan(world.now()).unwrap();
        world.writer.lines(20);
        world.finish();
        let away = world.rename_alone();
        world.writer.lines(5);
        if undone {
            // The runtime could not open another: the kubelet takes the rename back.
            fs::rename(&away, &world.writer.live).unwrap();
        } else {
            world.writer.file = File::options().create(true).append(true).open(&world.writer.live).unwrap();
            if compressed {
                let status = std::process::Command::new("gzip").arg(&away).status().unwrap();
                assert!(status.success());
            }
        }
        world.writer.lines(20);
        world.finish();
        assert_eq!(world.lost(), [0_u32; 0], "compressed {compressed}, undone {undone}");
        assert!(world.taken.values().all(|times| *times == 1), "compressed {compressed}, undone {undone}: {:?}", world.taken);
        world.run(&Step::Kill { taken: false });
        world.finish();
        assert_eq!(world.lost(), [0_u32; 0], "after a restart; compressed {compressed}, undone {undone}");
    }
}

#[test]
fn a_line_in_parts_waits_for_its_end_while_there_is_no_room() {
    let root = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(root.path());
    let settings = LogSettings { stream_bytes: 1, age: None, ..LogSettings::new(Layout::Raw) };
    let parts = TailerParts { settings, log_dir: root.path().join("containers"), node: "n".to_owned(), cluster_name: "c".to_owned() };
    let mut tailer = Tailer::new(parts, Restored::Fresh);
    let at = |mono: i64| Now { mono, wall: 1_795_168_801_000 + mono };
    tailer.scan(at(0)).unwrap();
    writer.lines(1);
    writer.split();
    tailer.turn(at(4000));
    tailer.seal_all();
    let first = tailer.take_ready();
    assert_eq!(first.len(), 1);
    // The end is there, but the batch on its way leaves no room to read it.
    writer.complete();
    for mono in (5000..100_000).step_by(500) {
        tailer.turn(at(mono));
        assert_eq!(tailer.take_ready().len(), 0);
    }
    tailer.acknowledge(first[0].id, None, at(100_000));
    tailer.turn(at(100_000));
    tailer.seal_all();
    let events: Vec<_> =
        tailer.take_ready().iter().flat_map(|sealed| sealed.batch.events().map(|event| event.message).collect::<Vec<_>>()).collect();
    assert_eq!(events, ["line 2 joined"]);
}

#[test]
fn deleted_files_beyond_the_disk_budget_are_given_up_and_counted() {
    let root = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(root.path());
    let settings = LogSettings { held_bytes: 1000, memory_bytes: 1, age: None, ..LogSettings::new(Layout::Raw) };
    let parts = TailerParts { settings, log_dir: root.path().join("containers"), node: "n".to_owned(), cluster_name: "c".to_owned() };
    let mut tailer = Tailer::new(parts, Restored::Fresh);
    let now = Now::default();
    tailer.scan(now).unwrap();
    writer.lines(100);
    tailer.turn(Now { mono: 5000, ..now });
    assert!(tailer.is_full());
    for _ in 0..2 {
        writer.lines(100);
        writer.rotate(0);
        tailer.scan(now).unwrap();
    }
    writer.compress();
    fs::remove_dir_all(root.path().join("pods")).unwrap();
    tailer.scan(now).unwrap();
    let evicted = tailer.snapshot(now).counters.evicted_bytes;
    assert!(evicted > 5000, "only {evicted} bytes");
    assert!(tailer.snapshot(now).held_bytes <= 1000);
}

#[test]
fn a_file_truncated_and_then_renamed_does_not_make_the_next_one_old() {
    let mut world = World::new();
    let steps =
        [Step::Rotate { late_lines: 1 }, Step::Write(1), Step::Wait(1), Step::CopyTruncate, Step::Rotate { late_lines: 0 }, Step::Write(1)];
    for step in &steps {
        world.run(step);
    }
    world.finish();
    assert_eq!(world.lost(), [0_u32; 0]);
    assert!(world.taken.values().all(|times| *times == 1), "{:?}", world.taken);
}

#[test]
fn a_file_truncated_and_written_to_the_same_size_is_read_again() {
    let mut world = World::new();
    for step in [Step::Rotate { late_lines: 1 }, Step::WriteTorn, Step::CopyTruncate, Step::WriteTorn] {
        world.run(&step);
    }
    world.finish();
    assert_eq!(world.lost(), [0_u32; 0]);
}
