//! Events of the file system. They make things come sooner; the sweep is the truth.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::event::{EventKind, ModifyKind};
use notify::{RecursiveMode, Watcher};
use tokio::sync::{Notify, mpsc};
use tracing::warn;

use super::tail::{Now, Tailer};

/// Changes that wait: as many as a turn can have to do with. What does not fit is a reason to look at everything.
const WAITING: usize = 1024;

/// What the kernel tells of the directories that are watched.
pub(super) struct Events {
    /// `None` where the system has no watch left, which costs time only.
    watcher: Option<notify::RecommendedWatcher>,
    log_dir: PathBuf,
    changed: mpsc::Receiver<Change>,
    missed: Arc<Notify>,
}

/// What the task hears.
pub(super) enum News {
    /// Something happened to a path.
    Changed(Change),
    /// Changes were lost: every file may have grown, and others may have come.
    Missed,
}

/// What happened to a path.
pub(super) struct Change {
    path: PathBuf,
    /// It came, went, or got another name.
    structural: bool,
}

/// The watcher's end.
struct Listener {
    changed: mpsc::Sender<Change>,
    /// Some did not fit, here or in the kernel's queue.
    missed: Arc<Notify>,
}

impl Listener {
    fn hear(&self, event: notify::Result<notify::Event>) {
        let Ok(event) = event else { return self.missed.notify_one() };
        if event.need_rescan() {
            return self.missed.notify_one();
        }
        let structural = matches!(event.kind, EventKind::Create(_) | EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)));
        if !structural && !matches!(event.kind, EventKind::Modify(ModifyKind::Data(_))) {
            return;
        }
        if !event.paths.into_iter().all(|path| self.changed.try_send(Change { path, structural }).is_ok()) {
            self.missed.notify_one();
        }
    }
}

/// Both ends.
fn channel() -> (Listener, mpsc::Receiver<Change>, Arc<Notify>) {
    let (sender, changed) = mpsc::channel(WAITING);
    let missed = Arc::new(Notify::new());
    (Listener { changed: sender, missed: Arc::clone(&missed) }, changed, missed)
}

impl Events {
    /// Of the log directory, and of what is to be watched besides.
    pub(super) fn of(log_dir: &Path) -> Self {
        let (listener, changed, missed) = channel();
        let watcher = notify::recommended_watcher(move |event| listener.hear(event)).and_then(|mut watcher| {
            watcher.watch(log_dir, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        let complain = |error: &notify::Error| warn!(dir = %log_dir.display(), %error, "no events of the file system; files are looked at twice a second, the log directory every 10 s");
        Self { watcher: watcher.inspect_err(complain).ok(), log_dir: log_dir.to_owned(), changed, missed }
    }

    /// What happened next. Safe to drop and call again.
    pub(super) async fn next(&mut self) -> News {
        tokio::select! {
            // Without a watcher this end is closed.
            Some(change) = self.changed.recv() => News::Changed(change),
            () = self.missed.notified() => News::Missed,
        }
    }

    /// Watches what the tailer wants watched.
    pub(super) fn follow(&mut self, tailer: &mut Tailer, now: Now) {
        let Some(watcher) = &mut self.watcher else { return };
        for (dir, on) in tailer.take_watch_changes() {
            if dir == self.log_dir {
                // Watched in any case.
                if on {
                    tailer.watched(&dir, now);
                }
            } else if !on {
                // A directory that is gone is not watched any more.
                let _ = watcher.unwatch(&dir);
            } else if watcher.watch(&dir, RecursiveMode::NonRecursive).is_ok() {
                tailer.watched(&dir, now);
            }
        }
    }

    /// Tells the tailer; true if the log directory is to be listed again.
    pub(super) fn take(&mut self, news: News, tailer: &mut Tailer, now: Now) -> bool {
        let mut next = match news {
            News::Changed(change) => Some(change),
            News::Missed => {
                tailer.touched_all(now);
                return true;
            }
        };
        let mut sweep = false;
        while let Some(change) = next {
            tailer.touched(&change.path, now);
            sweep |= change.structural && change.path.parent() == Some(&self.log_dir);
            next = self.changed.try_recv().ok();
        }
        sweep
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc::{self as blocking, RecvTimeoutError};
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_queue_that_overflows_in_the_kernel_is_a_reason_to_look_at_everything() {
        let dir = tempfile::tempdir().unwrap();
        let most: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
        // The watcher's thread stands still in its first event until the queue is full.
        let (heard, events) = blocking::channel();
        let (go_on, stand) = blocking::sync_channel::<()>(0);
        let mut watcher = notify::recommended_watcher(move |event| {
            heard.send(event).expect("the test listens");
            let _ends_with_the_test = stand.recv();
        })
        .unwrap();
        watcher.watch(dir.path(), RecursiveMode::NonRecursive).unwrap();
        fs::write(dir.path().join("first"), "").unwrap();
        let first = events.recv_timeout(SOON).unwrap();
        // Two events each, and no two alike in a row, which the kernel would put together.
        for number in 0..=most / 2 {
            let path = dir.path().join(number.to_string());
            drop(fs::File::create(&path).unwrap());
            fs::remove_file(path).unwrap();
        }
        drop(go_on);
        let (listener, _changed, missed) = channel();
        listener.hear(first);
        assert!(timeout(Duration::ZERO, missed.notified()).await.is_err(), "nothing is lost yet");
        loop {
            match events.recv_timeout(SOON) {
                Ok(event) => {
                    let lost = event.as_ref().is_ok_and(notify::Event::need_rescan);
                    if lost {
                        listener.hear(event);
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!("the kernel told of no overflow"),
            }
        }
        timeout(SOON, missed.notified()).await.expect("the loss is told");
    }

    #[tokio::test]
    async fn what_does_not_fit_here_is_missed_too() {
        let (listener, mut changed, missed) = channel();
        let event = || notify::Event::new(EventKind::Create(notify::event::CreateKind::File)).add_path("/log/x".into());
        for _ in 0..WAITING {
            listener.hear(Ok(event()));
        }
        assert!(timeout(Duration::ZERO, missed.notified()).await.is_err());
        listener.hear(Ok(event()));
        timeout(SOON, missed.notified()).await.expect("the loss is told");
        assert!(changed.recv().await.is_some_and(|change| change.structural));
        listener.hear(Err(notify::Error::generic("broken")));
        timeout(SOON, missed.notified()).await.expect("so is an error");
    }
}
