//! The node's journal as Container Insights has it: which entry goes to which streams, and in what form.
//!
//! | stream | entries | members |
//! |---|---|---|
//! | `{node}.host.dmesg` | of the kernel | host, ident, message, pid |
//! | `{node}.host.messages` | priority 0 to 6, but for mail, cron and authentication | the same |
//! | `{node}.host.secure` | of facility 10 | the same |
//! | `{node}-dataplane.systemd.UNIT` | of the units that are named | hostname, systemd_unit, message |
//!
//! and in each `az` and `ec2_instance_id`, where they are known.

mod file;

use std::borrow::Cow;

use serde_json::{Map, Value};

pub use file::{Cursor, Entry, Header, JournalError, ReadAt};

use super::settings::ReadFrom;

/// Facilities that `messages` leaves out: mail, cron, and what `secure` has (`syslog(3)`).
const NOT_MESSAGES: [&str; 3] = ["2", "9", "10"];

/// How the journal is shipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalSettings {
    /// Directories of journals; those that are not there are empty.
    pub dirs: Vec<String>,
    /// The three streams of the host.
    pub host: bool,
    /// Units with a stream in the dataplane group.
    pub units: Vec<String>,
    /// Where files begin that were there before the agent.
    pub read_from: ReadFrom,
    /// Members of each record that say which node it is.
    pub node: Vec<(String, String)>,
}

impl Default for JournalSettings {
    /// As Container Insights has it: the units of runtime and kubelet, from now on.
    fn default() -> Self {
        Self {
            dirs: ["/var/log/journal", "/run/log/journal"].map(str::to_owned).into(),
            host: true,
            units: ["docker.service", "containerd.service", "kubelet.service"].map(str::to_owned).into(),
            read_from: ReadFrom::Tail,
            node: Vec::new(),
        }
    }
}

/// The fields of an entry that records are made of; empty where it has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    message: Vec<u8>,
    host: String,
    unit: String,
    identifier: String,
    pid: String,
    syslog_pid: String,
    priority: String,
    facility: String,
    transport: String,
}

impl Fields {
    /// Takes a field, `NAME=value`.
    pub fn take(&mut self, field: &[u8]) {
        let Some(equals) = memchr::memchr(b'=', field) else { return };
        let (name, value) = (&field[..equals], &field[equals + 1..]);
        let place = match name {
            b"MESSAGE" => {
                self.message = value.to_vec();
                return;
            }
            b"_HOSTNAME" => &mut self.host,
            b"_SYSTEMD_UNIT" => &mut self.unit,
            b"SYSLOG_IDENTIFIER" => &mut self.identifier,
            b"_PID" => &mut self.pid,
            b"SYSLOG_PID" => &mut self.syslog_pid,
            b"PRIORITY" => &mut self.priority,
            b"SYSLOG_FACILITY" => &mut self.facility,
            b"_TRANSPORT" => &mut self.transport,
            _ => return,
        };
        *place = String::from_utf8_lossy(value).into_owned();
    }

    /// The streams that the entry goes to.
    pub fn streams<'a>(&'a self, settings: &'a JournalSettings) -> impl Iterator<Item = Place<'a>> {
        let urgent = matches!(self.priority.as_str(), "0" | "1" | "2" | "3" | "4" | "5" | "6");
        let host = [
            ("dmesg", self.transport == "kernel"),
            ("messages", urgent && !NOT_MESSAGES.contains(&self.facility.as_str())),
            ("secure", self.facility == "10"),
        ];
        let unit = settings.units.contains(&self.unit).then_some(Place::Unit(&self.unit));
        host.into_iter().filter(move |(_, is)| settings.host && *is).map(|(name, _)| Place::Host(name)).chain(unit)
    }

    /// The record for the place, as JSON text; `masked` hides in the message what must not leave the node.
    pub fn record(&self, place: &Place<'_>, settings: &JournalSettings, masked: impl FnOnce(&[u8]) -> Option<String>) -> String {
        let message = masked(&self.message).map_or_else(|| String::from_utf8_lossy(&self.message), Cow::Owned);
        let pid = if self.pid.is_empty() { &self.syslog_pid } else { &self.pid };
        let members = match place {
            Place::Host(_) => {
                vec![("host", self.host.as_str()), ("ident", self.identifier.as_str()), ("pid", pid.as_str()), ("message", &*message)]
            }
            Place::Unit(_) => vec![("hostname", self.host.as_str()), ("systemd_unit", self.unit.as_str()), ("message", &*message)],
        };
        let node = settings.node.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let members = members.into_iter().chain(node).filter(|(name, value)| *name == "message" || !value.is_empty());
        Value::Object(members.map(|(name, value)| (name.to_owned(), Value::from(value))).collect::<Map<_, _>>()).to_string()
    }
}

/// A stream of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// One of the host's three.
    Host(&'static str),
    /// A unit's.
    Unit(&'a str),
}

impl Place<'_> {
    /// Log group and stream.
    pub fn names(&self, cluster: &str, node: &str) -> (String, String) {
        match self {
            Self::Host(name) => (format!("/aws/containerinsights/{cluster}/host"), format!("{node}.host.{name}")),
            // Units of templates may have colons in their names, which streams may not.
            Self::Unit(unit) => (
                format!("/aws/containerinsights/{cluster}/dataplane"),
                format!("{node}-dataplane.systemd.{}", unit.replace([':', '*'], "_")),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// Written by systemd-journal-remote 252 from the same 308 entries, in both layouts.
    pub(super) const FILES: [&str; 2] = ["zstd", "zstd-compact"];

    pub(super) fn file(name: &str) -> Vec<u8> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("testdata/journal/{name}.journal.gz"));
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
        bytes
    }

    pub(super) fn in_memory(bytes: &[u8]) -> impl Fn(u64, &mut [u8]) -> bool {
        move |at, buffer| {
            let from = usize::try_from(at).ok().and_then(|at| bytes.get(at..)?.get(..buffer.len()));
            from.is_some_and(|from| {
                buffer.copy_from_slice(from);
                true
            })
        }
    }

    fn records(name: &str, settings: &JournalSettings) -> Vec<(u64, String, Value)> {
        let bytes = file(name);
        let read = in_memory(&bytes);
        let header = Header::read(&read).unwrap();
        let mut cursor = Cursor::default();
        let mut records = Vec::new();
        while let Some(offset) = header.next(&read, &mut cursor).unwrap() {
            let mut fields = Fields::default();
            let entry = header.entry(&read, offset, |field| fields.take(field)).unwrap();
            for place in fields.streams(settings) {
                let text = fields.record(&place, settings, |_| None);
                records.push((entry.realtime_us, place.names("gold", "n").1, serde_json::from_str(&text).unwrap()));
            }
        }
        records
    }

    #[test]
    fn entries_go_where_container_insights_has_them() {
        let settings = JournalSettings { node: vec![("az".into(), "eu-west-1a".into())], ..JournalSettings::default() };
        for name in FILES {
            let records = records(name, &settings);
            let of = |stream: &str| records.iter().filter(|record| record.1 == stream).map(|record| &record.2).collect::<Vec<_>>();
            let host = |ident: &str, pid: Option<&str>, message: &str| {
                let mut record = serde_json::json!({"host": "ip-10-0-1-23", "ident": ident, "message": message, "az": "eu-west-1a"});
                if let Some(pid) = pid {
                    record["pid"] = pid.into();
                }
                record
            };
            assert_eq!(of("n.host.dmesg"), [&host("kernel", None, "Linux version 6.1")], "{name}");
            assert_eq!(of("n.host.secure"), [&host("sshd", Some("77"), "Accepted publickey")], "{name}");
            let messages = of("n.host.messages");
            assert_eq!(messages.len(), 304, "{name}: neither debug nor mail nor secure nor what has no priority");
            assert_eq!(messages[..2], [&host("kernel", None, "Linux version 6.1"), &host("kubelet", Some("99"), "I1120 kubelet started")]);
            assert_eq!(*messages[2], host("containerd", Some("98"), &format!("long {}", "abcdefgh ".repeat(400))), "{name}: compressed");
            assert_eq!(*messages[3], host("app", None, "two\nlines \u{FFFD} bad"), "{name}");
            let kubelet = of("n-dataplane.systemd.kubelet.service");
            assert_eq!(kubelet.len(), 301, "{name}");
            let first = serde_json::json!({
                "hostname": "ip-10-0-1-23", "systemd_unit": "kubelet.service", "message": "I1120 kubelet started", "az": "eu-west-1a"});
            assert_eq!(*kubelet[0], first, "{name}");
            assert_eq!(of("n-dataplane.systemd.containerd.service").len(), 2, "{name}: of any priority");
            assert_eq!(records[0].0, 1_795_168_801_000_250, "{name}");
        }
    }

    #[test]
    fn only_what_is_asked_for() {
        let settings = JournalSettings { host: false, units: vec!["app.service".into()], ..JournalSettings::default() };
        let records = records("zstd", &settings);
        assert_eq!(records.iter().map(|record| record.1.as_str()).collect::<Vec<_>>(), ["n-dataplane.systemd.app.service"]);
        assert_eq!(Place::Unit("a:b@1.service").names("c", "n").1, "n-dataplane.systemd.a_b@1.service");
    }
}
