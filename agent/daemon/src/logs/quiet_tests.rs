//! Files that are quiet cost nothing, and wake at once.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use stanchion_core::logs::record::Layout;
use stanchion_core::logs::settings::LogSettings;

use super::tail::{Now, Restored, Tailer, TailerParts};

fn tailer(dir: &Path) -> Tailer {
    let settings = LogSettings { age: None, ..LogSettings::new(Layout::Raw) };
    let parts = TailerParts { settings, log_dir: dir.to_owned(), node: "n".to_owned(), cluster_name: "c".to_owned() };
    Tailer::new(parts, Restored::Fresh)
}

fn files(dir: &Path, count: usize) -> Vec<File> {
    (0..count).map(|index| File::create(dir.join(format!("web-{index}_shop_app-{index:064x}.log"))).unwrap()).collect()
}

fn write(file: &mut File, number: usize) {
    writeln!(file, "2026-11-20T10:00:00.{number:09}Z stdout F line {number}").unwrap();
}

/// Reads what there is and acknowledges it; when to look again.
fn settle(tailer: &mut Tailer, mono: i64) -> i64 {
    let now = Now { mono, wall: mono };
    for _ in 0..1000 {
        let turn = tailer.turn(now);
        for sealed in tailer.take_ready() {
            tailer.acknowledge(sealed.id, None, now);
        }
        if !turn.progress {
            return turn.next_ms;
        }
    }
    panic!("it reads for ever");
}

#[test]
fn a_quiet_file_is_watched_hardly_looked_at_and_woken() {
    let dir = tempfile::tempdir().unwrap();
    let dir = fs::canonicalize(dir.path()).unwrap();
    let mut files = files(&dir, 1);
    let mut tailer = tailer(&dir);
    tailer.scan(Now::default()).unwrap();
    let mut mono = 4000;
    while mono < 12_000 {
        mono = settle(&mut tailer, mono);
    }
    assert_eq!(tailer.take_watch_changes(), [(dir.clone(), true)]);
    tailer.watched(&dir, Now { mono, wall: mono });
    mono = settle(&mut tailer, mono);
    for _ in 0..5 {
        mono = settle(&mut tailer, mono);
    }
    let looks = tailer.counters_mut().looks;
    for _ in 0..10 {
        mono = settle(&mut tailer, mono);
    }
    assert!(tailer.counters_mut().looks - looks <= 11, "once in ten seconds");
    // The event of a write makes it due at once; as it grows it needs no watch.
    write(&mut files[0], 1);
    let path = dir.join(format!("web-0_shop_app-{:064x}.log", 0));
    tailer.touched(&path, Now { mono, wall: mono });
    settle(&mut tailer, mono);
    assert_eq!(tailer.counters_mut().lines_read, 1);
    assert_eq!(tailer.take_watch_changes(), [(dir, false)]);
}

#[test]
fn a_line_is_in_a_closed_batch_a_second_and_a_quarter_after_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = files(dir.path(), 1);
    let mut tailer = tailer(dir.path());
    tailer.scan(Now::default()).unwrap();
    // When the next batch is closed; a caller may come late, but not early.
    let mut closed = |mut mono: i64| {
        for _ in 0..100 {
            let now = Now { mono, wall: mono };
            let turn = tailer.turn(now);
            let ready = tailer.take_ready();
            ready.iter().for_each(|sealed| tailer.acknowledge(sealed.id, None, now));
            if !ready.is_empty() {
                return mono;
            }
            mono = mono.max(turn.next_ms);
        }
        panic!("no batch is closed");
    };
    let (mut mono, mut longest) = (4000, 0);
    for number in 0..200 {
        write(&mut files[0], number);
        let after = closed(mono) - mono;
        longest = longest.max(after);
        // The next comes at any time between two looks, and the file is one that grows.
        mono += after + 7 * i64::try_from(number).unwrap() % 250;
    }
    assert!((1100..=1251).contains(&longest), "{longest} ms");
}

#[test]
fn without_events_every_file_is_found_to_have_grown() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = files(dir.path(), 30);
    let mut tailer = tailer(dir.path());
    tailer.scan(Now::default()).unwrap();
    let mut mono = 4000;
    for round in 0..40 {
        mono = settle(&mut tailer, mono).max(mono + 500);
        write(&mut files[round % 30], round);
    }
    settle(&mut tailer, mono + 1100);
    assert_eq!(tailer.counters_mut().lines_read, 40);
    // Events were lost while all were watched: each is looked at again.
    for _ in 0..20 {
        mono = settle(&mut tailer, mono + 1100);
    }
    for (dir, on) in tailer.take_watch_changes() {
        if on {
            tailer.watched(&dir, Now { mono, wall: mono });
        }
    }
    mono = settle(&mut tailer, mono);
    files.iter_mut().for_each(|file| write(file, 99));
    tailer.touched_all(Now { mono, wall: mono });
    settle(&mut tailer, mono);
    assert_eq!(tailer.counters_mut().lines_read, 70);
}

#[test]
fn ten_thousand_files_with_a_hundred_active_cost_what_the_hundred_cost() {
    let dir = tempfile::tempdir().unwrap();
    let dir = fs::canonicalize(dir.path()).unwrap();
    let mut files = files(&dir, 10_000);
    // Two open files for each would be more than some machines allow a process.
    files.truncate(100);
    let mut tailer = tailer(&dir);
    let begun = Instant::now();
    tailer.scan(Now::default()).unwrap();
    let mut mono = 9600;
    for mono in [4000, 9500, mono] {
        settle(&mut tailer, mono);
        for (dir, on) in tailer.take_watch_changes() {
            if on {
                tailer.watched(&dir, Now { mono, wall: mono });
            }
        }
    }
    let started = begun.elapsed();
    let looks = tailer.counters_mut().looks;
    let begun = Instant::now();
    let seconds = 8;
    let until = mono + seconds * 1000;
    let mut written = 0;
    while mono < until {
        for file in &mut files {
            written += 1;
            write(file, written);
        }
        if mono < until - 7900 {
            let path = |index: usize| dir.join(format!("web-{index}_shop_app-{index:064x}.log"));
            (0..100).for_each(|index| tailer.touched(&path(index), Now { mono, wall: mono }));
        }
        settle(&mut tailer, mono);
        mono += 100;
    }
    let spent = begun.elapsed();
    settle(&mut tailer, mono + 1000);
    assert_eq!(tailer.counters_mut().lines_read, written as u64);
    // Four times a second for each of the hundred, once in ten seconds for the others.
    let looked = tailer.counters_mut().looks - looks;
    println!("start {started:?}, {seconds} s of reading {spent:?}, {looked} looks");
    assert!(looked < 100 * (4 * seconds as u64 + 4) + 2 * 10_000, "{looked} looks");
    // Generous: this build is not optimised, and its machine has other work.
    assert!(started < Duration::from_secs(60) && spent < Duration::from_secs(30), "start {started:?}, {seconds} s of reading {spent:?}");
}
