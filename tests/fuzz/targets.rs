//! Every parser that meets bytes from outside, with what must hold of its answer. One function a target: the fuzzer
//! (`tests/fuzz`) and the smoke test (`tests/tests/fuzz_smoke.rs`) call the same ones. A target panics when something
//! does not hold; an error of the parser is a good answer.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use stanchion_core::branch;
use stanchion_core::cni::args::Invocation;
use stanchion_core::cni::config::NetConf;
use stanchion_core::cni::result::PrevResult;
use stanchion_core::cni::spool::Spooled;
use stanchion_core::config::{Config, aws_node};
use stanchion_core::conflist::{self, Chained, Conflist, Owner};
use stanchion_core::ids::PodName;
use stanchion_core::ipam::{Checkpoint, CoolingFile};
use stanchion_core::logs::batch::MAX_MESSAGE_BYTES;
use stanchion_core::logs::config::LogFile;
use stanchion_core::logs::cri::{Header, Line};
use stanchion_core::logs::enrich::Identity;
use stanchion_core::logs::fluentbit;
use stanchion_core::logs::join::{Bounds, Event, Joiner, Mark};
use stanchion_core::logs::journal;
use stanchion_core::logs::multiline::Rule;
use stanchion_core::logs::names;
use stanchion_core::logs::parser;
use stanchion_core::logs::positions::{FINGERPRINT_BYTES, Fingerprint, Positions};
use stanchion_core::logs::record::{Layout, Merge, RecordOptions, RecordWriter};
use stanchion_core::logs::route::{Place, Template};
use stanchion_core::logs::settings::{LogSettings, Redaction};
use stanchion_core::manifests;
use stanchion_core::metrics::statsd::Statsd;
use stanchion_core::metrics::{cgroup, kubelet, proc, scrape};
use stanchion_core::network::takeover;
use stanchion_core::policy::dns;
use stanchion_core::policy::frames::{Datagram, Messages};
use stanchion_core::policy::image::Slot;
use stanchion_proto as wire;
use stanchion_proto::frame::{self, HEADER, MAX_FRAME, Method};

/// A target.
pub type Target = fn(&[u8]);

/// The targets by name; each has a directory of that name in `tests/fuzz/corpus`.
pub const TARGETS: [(&str, Target); 27] = [
    ("aws_node", aws_node_daemon_set),
    ("branch", branch_annotation),
    ("checkpoint", checkpoint),
    ("cni_environment", cni_environment),
    ("cni_frames", cni_frames),
    ("cni_stdin", cni_stdin),
    ("conflist", network_configuration),
    ("container_log", container_log),
    ("dns", dns_message),
    ("environment", environment),
    ("fluent_bit", fluent_bit),
    ("fluent_bit_state", fluent_bit_state),
    ("journal", journal),
    ("kernel_text", kernel_text),
    ("kubelet", kubelet_summary),
    ("legacy_tables", legacy_tables),
    ("line_parsers", line_parsers),
    ("log_names", log_names),
    ("log_settings", log_settings),
    ("manifests", read_manifests),
    ("nft_listing", nft_listing),
    ("pod_frames", pod_frames),
    ("positions", positions),
    ("redaction", redaction),
    ("scrape", scrape_text),
    ("spool", spool),
    ("statsd", statsd_packets),
];

/// Standard input of the plugin: the configuration and the previous result in it.
pub fn cni_stdin(bytes: &[u8]) {
    let _ = NetConf::peek_version(bytes);
    if let Ok(config) = NetConf::parse(bytes) {
        assert!(!config.name.is_empty(), "a configuration without a name was taken");
        let _ = config.read_prev_result();
    }
    if let Ok(json) = serde_json::from_slice(bytes)
        && let Ok(result) = PrevResult::from_json(json)
    {
        let _ = result.upstream(&PodName { namespace: "shop".to_owned(), name: "web-1".to_owned() });
    }
}

/// What comes over the agent's socket: frames of the plugin's requests, and each as the reply that it is not.
pub fn cni_frames(mut bytes: &[u8]) {
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER>() {
        let Ok((first, length)) = frame::header(*head) else { return };
        assert!(length < MAX_FRAME, "{length} bytes would be waited for");
        let body = &rest[..length.min(rest.len())];
        match Method::from_number(first) {
            Some(Method::AddNetwork) => read_again::<wire::AddNetworkRequest, wire::AddNetworkReply>(body),
            Some(Method::ActivateEndpoint) => read_again::<wire::ActivateEndpointRequest, wire::ActivateEndpointReply>(body),
            Some(Method::DelNetwork) => read_again::<wire::DelNetworkRequest, wire::DelNetworkReply>(body),
            Some(Method::CheckNetwork) => read_again::<wire::CheckNetworkRequest, wire::CheckNetworkReply>(body),
            Some(Method::CollectGarbage) => read_again::<wire::CollectGarbageRequest, wire::CollectGarbageReply>(body),
            Some(Method::Status) => read_again::<wire::StatusRequest, wire::StatusReply>(body),
            None => {
                if let Err(status) = frame::reply::<wire::StatusReply>(first, body) {
                    let told = frame::encode_error(&status);
                    assert!(told.len() <= MAX_FRAME + HEADER, "an error longer than a frame");
                }
            }
        }
        bytes = &rest[body.len()..];
    }
}

/// A message that can be compared and shown.
trait Wire: prost::Message + Default + PartialEq + std::fmt::Debug {}
impl<M: prost::Message + Default + PartialEq + std::fmt::Debug> Wire for M {}

/// A request or reply that can be read is the same once it was written and read again.
fn read_again<A: Wire, B: Wire>(body: &[u8]) {
    fn one<M: Wire>(body: &[u8]) {
        if let Ok(message) = frame::decode::<M>(body) {
            let written = frame::encode(0, &message).expect("no longer than the frame it came in");
            assert_eq!(frame::decode::<M>(&written[HEADER..]).expect("what was written is read"), message);
        }
    }
    one::<A>(body);
    one::<B>(body);
}

/// An answer of a DNS server: names that policies can mean, and no more of them than its bytes can hold.
pub fn dns_message(bytes: &[u8]) {
    let Ok(answers) = dns::answers(bytes) else { return };
    // A record takes 16 bytes at least, and gives an address to each of 17 names at most.
    assert!(answers.len() <= bytes.len() / 16 * 17, "{} answers in {} bytes", answers.len(), bytes.len());
    for answer in answers {
        assert!(answer.name.len() <= 253 && answer.ttl <= i32::MAX.cast_unsigned(), "{answer:?}");
        let meant = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.');
        assert!(answer.name.bytes().all(meant) && !answer.name.ends_with('.') && !answer.name.contains(".."), "{answer:?}");
    }
}

/// Frames that the programs copied out of pods' traffic: each after its length in two bytes, the highest bit of which tells two pods
/// apart.
pub fn pod_frames(mut bytes: &[u8]) {
    let (mut messages, mut taken) = (Messages::default(), 0);
    while let Some((head, rest)) = bytes.split_first_chunk::<2>() {
        let head = u16::from_be_bytes(*head);
        let frame = &rest[..usize::from(head & 0x7fff).min(rest.len())];
        bytes = &rest[frame.len()..];
        taken += frame.len();
        for message in messages.of(Slot(head >> 15), frame) {
            assert!(message.len() <= taken, "a message of more bytes than came");
            dns_message(&message);
        }
        if let Some(datagram) = Datagram::read(frame) {
            let whole = datagram.with_checksum(frame);
            let again = Datagram::read(&whole).expect("what was read is read again");
            assert_eq!(
                (again.source, again.destination, again.destination_port),
                (datagram.source, datagram.destination, datagram.destination_port)
            );
            assert_eq!(again.with_checksum(&whole), whole, "a checksum does not depend on the one that was there");
        }
    }
}

/// A file of the node's journal: every entry that can be read makes records that can be read back.
pub fn journal(bytes: &[u8]) {
    let read = |at: u64, buffer: &mut [u8]| {
        let there = usize::try_from(at).ok().and_then(|at| bytes.get(at..)?.get(..buffer.len()));
        there.is_some_and(|there| {
            buffer.copy_from_slice(there);
            true
        })
    };
    let Ok(header) = journal::Header::read(&read) else { return };
    let settings = journal::JournalSettings::default();
    for from in [0, bytes.len() as u64 / 2] {
        let Ok(mut cursor) = header.seek(&read, from) else { continue };
        let mut entries = 0;
        while let Ok(Some(offset)) = header.next(&read, &mut cursor) {
            entries += 1;
            // Arrays may lie over one another, but each begins behind the one before.
            assert!(entries <= (bytes.len() / 8) * (bytes.len() / 4), "an endless chain");
            let mut fields = journal::Fields::default();
            if header.entry(&read, offset, |field| fields.take(field)).is_ok() {
                for place in fields.streams(&settings) {
                    let text = fields.record(&place, &settings, |_| None);
                    let record: serde_json::Value = serde_json::from_str(&text).expect("a record is JSON");
                    assert!(record["message"].is_string(), "{text}");
                }
            }
            if entries > 2000 {
                // More of the same tells nothing more.
                break;
            }
        }
    }
}

/// The plugin's environment: one `NAME=value` a line.
pub fn cni_environment(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let get = |name: &str| text.lines().find_map(|line| line.split_once('=').filter(|(key, _)| *key == name).map(|(_, v)| v.to_owned()));
    if let Ok(call) = Invocation::from_env(get) {
        // These become file names and kernel names.
        assert!(!call.container_id.contains('/') && !call.if_name.contains('/'), "a name with a slash was taken: {call:?}");
    }
}

/// The agent's environment: one `NAME=value` a line. Errors name the variable.
pub fn environment(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let get = |name: &str| text.lines().find_map(|line| line.split_once('=').filter(|(key, _)| *key == name).map(|(_, v)| v.to_owned()));
    if let Err(errors) = Config::read(&get) {
        assert!(!errors.is_empty(), "refused without a reason");
    }
}

/// A container's log file from its first byte to its last event, in each record layout.
pub fn container_log(bytes: &[u8]) {
    for rules in [&[][..], &["cri", "java", "go", "python", "ruby"][..]] {
        let rules: Arc<[Rule]> = rules.iter().filter_map(|name| Rule::built_in(name).ok()).collect();
        let is_plain = rules.is_empty();
        let mut joiner = Joiner::new(rules, Bounds { bytes: 4096, ..Bounds::default() });
        let (mut offset, mut read, mut events) = (0, 0, Vec::new());
        let [mut came, mut went] = [(); 2].map(|()| [Vec::new(), Vec::new()]);
        let mut emit = |event: Event<'_>| {
            assert!(!event.marks.is_empty(), "an event comes from nowhere");
            events.push((event.content.len(), event.marks[0]));
            went[event.output as usize].extend_from_slice(event.content);
            write_record(&event);
        };
        for text in bytes.split(|byte| *byte == b'\n') {
            let line = Line::parse(text);
            if line.header == Header::None {
                assert_eq!(&*line.content, text, "a line without a header is all content");
            }
            read += line.content.len() + 1;
            came[line.output as usize].extend_from_slice(&line.content);
            joiner.line(&line, Mark { generation: 1, offset }, 1_700_000_000_000, &mut emit);
            offset += text.len() as u64 + 1;
            assert!(joiner.resume(1, offset) <= offset, "reading would begin again after what was read");
        }
        joiner.flush(1_700_000_000_000, &mut emit);
        assert!(!joiner.is_open(), "something is open after the flush");
        let shipped: usize = events.iter().map(|(len, _)| len).sum();
        assert!(shipped <= read, "more content ({shipped}) than was read ({read})");
        assert!(!is_plain || came == went, "without rules what comes out of each output is what went in");
        assert!(events.iter().all(|(_, mark)| mark.offset <= offset), "an event begins after the end");
    }
}

/// Masks what the agent masks.
fn masked(settings: &LogSettings, content: &[u8]) -> String {
    let text = String::from_utf8_lossy(content).into_owned();
    settings.redactions.iter().fold(text, |text, rule| rule.pattern.replace_all(&text, rule.replacement.as_str()).into_owned())
}

/// A line that is longer than an event may be, in the parts in which its runtime wrote it: nothing that is to be masked can be read from
/// the events in a row.
pub fn redaction(bytes: &[u8]) {
    static RULES: OnceLock<[Arc<[Redaction]>; 2]> = OnceLock::new();
    let rules = RULES.get_or_init(|| {
        ["secret-[a-z]{4,40}", "[0-9]{12,19}"].map(|pattern| {
            let file = LogFile::parse(&format!("redact: [{{pattern: '{pattern}', replace: '#'}}]")).expect("a settings file");
            file.apply(LogSettings::new(Layout::Compact)).expect("settings").redactions
        })
    });
    if bytes.is_empty() {
        return;
    }
    let rules = &rules[bytes.len() % 2];
    // A little longer than what is held back of a line that is cut: one cut.
    let mut joiner = Joiner::new([].into(), Bounds { bytes: 4_200, ..Bounds::default() }).sparing(Arc::clone(rules));
    let mut told = String::new();
    let mut emit = |event: Event<'_>| {
        let text = String::from_utf8_lossy(event.content).into_owned();
        told += &rules.iter().fold(text, |text, rule| rule.pattern.replace_all(&text, rule.replacement.as_str()).into_owned());
    };
    let (mut length, mut offset) = (0, 0);
    for part in bytes.split(|byte| *byte == b'\n').cycle() {
        let part = &part[..part.len().min(600)];
        let last = length > 4_300 || offset > 200;
        let text = [if last { &b"2026-11-21T10:00:00Z stdout F "[..] } else { b"2026-11-21T10:00:00Z stdout P " }, part].concat();
        joiner.line(&Line::parse(&text), Mark { generation: 1, offset }, 1_700_000_000_000, &mut emit);
        (length, offset) = (length + part.len(), offset + 1);
        if last {
            break;
        }
    }
    joiner.flush(1_700_000_000_000, &mut emit);
    for rule in rules.iter() {
        assert_eq!(rule.pattern.find(&told).map(|found| found.as_str()), None, "can be read from the events in a row");
    }
}

fn write_record(event: &Event<'_>) {
    for (layout, merge) in
        [(Layout::FluentBit, Merge::Off), (Layout::FluentBit, Merge::Top), (Layout::Compact, Merge::Off), (Layout::Raw, Merge::Off)]
    {
        let writer = RecordWriter::new(&RecordOptions { layout, merge, ..RecordOptions::default() }, Some(&Identity::default()));
        let mut from = 0;
        // The parts of a split event each take at least a byte.
        for _ in 0..=event.content.len() {
            let mut body = vec![b'"'];
            let written = writer.write(event, from, &mut body);
            body.push(b'"');
            let message: String = serde_json::from_slice(&body).expect("a message is a JSON string in the body");
            assert_eq!(message.len(), written.message, "the message's size is what the service would count");
            assert!(message.len() <= MAX_MESSAGE_BYTES, "a message of {} bytes", message.len());
            if layout == Layout::FluentBit {
                // Numbers of any size are JSON; a reader decides what becomes of them.
                let _: serde::de::IgnoredAny = serde_json::from_str(&message).expect("a record is JSON");
                assert!(message.starts_with('{'), "a record is an object");
            }
            from += written.content;
            if from >= event.content.len() {
                break;
            }
            assert!(written.content > 0, "no progress at {from} of {}", event.content.len());
        }
        assert_eq!(from, event.content.len(), "bytes of an event are in no message");
    }
}

/// Names under /var/log, globs, templates of groups and streams.
pub fn log_names(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (first, second) = text.split_once('\n').unwrap_or((&text, ""));
    let _ = names::parse_flat(first);
    let _ = names::parse_pod_dir(first, second);
    if let Some(rotated) = names::parse_rotated(first, second) {
        assert!(second.len() >= first.len(), "{second:?} is no rotation of {first:?}: {rotated:?}");
    }
    let _ = names::glob(first, second);
    assert_eq!(names::glob("*", first), !first.contains('/'), "* matches every name without a slash: {first:?}");
    if let Ok(template) = Template::parse(first) {
        let place = Place { cluster: "c", node: "n", file: second };
        for name in [
            template.group(place, None, stanchion_core::logs::cri::Output::Stdout),
            template.stream(place, None, stanchion_core::logs::cri::Output::Stderr),
        ] {
            assert!((1..=512).contains(&name.chars().count()), "the service takes 1 to 512 characters, not {name:?}");
        }
    }
}

/// The two files that say which pod holds which address.
pub fn checkpoint(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(file) = Checkpoint::parse(text) {
        let written = serde_json::to_string(&file).expect("a checkpoint is JSON");
        assert_eq!(Checkpoint::parse(&written).expect("what was written is read"), file);
    }
    if let Ok(file) = CoolingFile::parse(text) {
        let written = serde_json::to_string(&file).expect("the file is JSON");
        assert_eq!(CoolingFile::parse(&written).expect("what was written is read"), file);
    }
}

/// How far each log file was acknowledged.
pub fn positions(bytes: &[u8]) {
    if let Ok(positions) = Positions::parse(bytes, "node1") {
        assert_eq!(Positions::parse(&positions.to_json(), "node1").expect("what was written is read"), positions);
    }
    let head = &bytes[..bytes.len().min(FINGERPRINT_BYTES)];
    assert!(Fingerprint::of(head).matches(bytes), "a file that grew is the same file");
}

/// A release that the plugin left for the agent.
pub fn spool(bytes: &[u8]) {
    if let Ok(spooled) = Spooled::parse(bytes) {
        let written = serde_json::to_vec(&spooled).expect("a release is JSON");
        assert_eq!(Spooled::parse(&written).expect("what was written is read"), spooled);
    }
}

/// Kubernetes manifests in YAML and JSON.
pub fn read_manifests(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Err(error) = manifests::parse("a.yaml", text) {
        assert!(error.to_string().contains("a.yaml"), "the error does not name the file: {error}");
    }
}

/// What `nft -j list` prints of aws-node's tables.
pub fn nft_listing(bytes: &[u8]) {
    if let Ok(listing) = serde_json::from_slice(bytes) {
        let removal = takeover::removal(&listing, |_| false);
        assert!(
            removal.iter().all(|command| command.get("delete").is_some() || command.get("flush").is_some()),
            "a take-over only removes"
        );
    }
}

/// The annotation by which AWS's controller tells of a pod's branch ENI.
pub fn branch_annotation(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(read) = branch::parse(text) else { return };
    assert!((1..=4094).contains(&read.vlan_id), "{read:?}");
    assert!(read.addresses(false).chain(read.addresses(true)).count() > 0, "a pod without an address: {read:?}");
    assert!(read.ipv4.is_none_or(|address| read.subnet.is_some_and(|subnet| subnet.contains(&address))), "{read:?}");
    let written = serde_json::json!([{
        "eniId": read.eni.to_string(),
        "ifAddress": read.mac.to_string(),
        "vlanId": read.vlan_id,
        "privateIp": read.ipv4,
        "ipv6Addr": read.ipv6,
        "subnetCidr": read.subnet.map(|subnet| subnet.to_string()),
    }]);
    assert_eq!(branch::parse(&written.to_string()), Ok(read));
}

/// A network configuration that somebody else may have written to: what is made of it has all that others chained into it, is ours, and
/// stays as it is.
pub fn network_configuration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let owner = conflist::owner(text);
    let Ok(present) = serde_json::from_str::<serde_json::Value>(text) else {
        assert_eq!(owner, Owner::Other, "no JSON is nobody's");
        return;
    };
    for chained in [&[][..], &[Chained::Portmap, Chained::Bandwidth, Chained::NoIpv6]] {
        let conflist = Conflist { version: "1.1.0", socket: Path::new("/run/a.sock"), log_file: "stderr", log_level: "DEBUG", chained };
        let rendered = conflist.render(&present);
        assert_eq!(conflist::owner(&rendered), Owner::Stanchion, "{rendered}");
        let document = serde_json::from_str(&rendered).expect("a configuration is JSON");
        let sorted = |configuration| {
            let mut others: Vec<String> = conflist::others(configuration).map(ToString::to_string).collect();
            others.sort_unstable();
            others
        };
        assert_eq!(sorted(&document), sorted(&present), "{rendered}");
        assert_eq!(conflist.render(&document), rendered);
    }
}

/// What `iptables-legacy-save` prints: when what is removed is gone, nothing of aws-node's is there, and all else is.
pub fn legacy_tables(bytes: &[u8]) {
    let Ok(saved) = std::str::from_utf8(bytes) else { return };
    let Some(removal) = takeover::legacy_removal(saved) else { return };
    let lines: Vec<&str> = removal.split_terminator('\n').collect();
    let [table, commands @ .., "COMMIT"] = &lines[..] else { panic!("no document: {removal}") };
    assert!(table.starts_with('*') && !commands.is_empty(), "{removal}");
    let of = |option: &str| commands.iter().filter_map(|command| command.strip_prefix(option)).collect::<BTreeSet<_>>();
    let (rules, chains) = (of("-D "), of("-X "));
    assert_eq!(of("-F "), chains);
    assert!(commands.iter().all(|command| ["-D ", "-F ", "-X "].iter().any(|option| command.starts_with(option))), "{removal}");
    assert!(chains.iter().all(|chain| chain.starts_with("AWS-SNAT-CHAIN-") || chain.starts_with("AWS-CONNMARK-CHAIN-")), "{removal}");
    let first = |text: &str| text.split(' ').next().unwrap_or_default().to_owned();
    let goes = |line: &str| match (line.strip_prefix("-A "), line.strip_prefix(':')) {
        (Some(rule), _) => rules.contains(rule) || chains.contains(first(rule).as_str()),
        (_, Some(chain)) => chains.contains(first(chain).as_str()),
        _ => false,
    };
    let left: Vec<&str> = saved.lines().filter(|line| !goes(line)).collect();
    assert_eq!(takeover::legacy_removal(&left.join("\n")), None, "what is left");
}

/// /proc and cgroup files.
pub fn kernel_text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = proc::stat(text).map(|stat| format!("{stat:?}"));
    let _ = proc::meminfo(text);
    if let Some(loads) = proc::loadavg(text) {
        let _ = loads.map(|load| load.to_string());
    }
    let _ = proc::process_stat(text);
    assert!(proc::net_dev(text).count() <= text.lines().count(), "an interface a line at most");
    assert!(proc::diskstats(text).count() <= text.lines().count(), "a disk a line at most");
    assert!(proc::mountinfo(text).all(|mount| mount.point.len() <= text.len()), "escapes only shorten");
    let _ = (cgroup::single(text), cgroup::cpu_stat_v2(text), cgroup::cpuacct_stat(text));
    for memory in [cgroup::memory_stat_v1(text), cgroup::memory_stat_v2(text)].into_iter().flatten() {
        let _ = memory.working_set();
    }
    for name in text.lines() {
        let _ = (cgroup::is_kubepods_root(name), cgroup::classify(name), Path::new(&cgroup::pod_uid(name)));
    }
}

/// What kubectl prints of aws-node: the migration prints values that Helm reads as they are meant.
pub fn aws_node_daemon_set(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(migration) = aws_node::migrate(text) {
        let yaml = migration.to_yaml();
        let values: serde_json::Value = serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{error}:\n{yaml}"));
        assert_eq!(values["env"], serde_json::json!(migration.env), "{yaml}");
    }
}

/// A Fluent Bit configuration: what the migration prints is a settings file that the agent reads.
pub fn fluent_bit(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(sections) = fluentbit::sections(text, &|_| Vec::new()) {
        let migration = fluentbit::migrate(&sections);
        let yaml = migration.to_yaml();
        assert_eq!(LogFile::parse(&yaml).unwrap_or_else(|error| panic!("{error}:\n{yaml}")), migration.file, "{yaml}");
    }
}

/// Fluent Bit's database and its write-ahead log, the database's length before them.
pub fn fluent_bit_state(bytes: &[u8]) {
    let Some((len, bytes)) = bytes.split_first_chunk() else { return };
    let (file, log) = bytes.split_at(bytes.len().min(u32::from_le_bytes(*len) as usize));
    if let Ok(files) = fluentbit::TailFiles::read(file, log) {
        // A row is two bytes at least, and pages are not read twice.
        assert!(files.len() <= bytes.len(), "{}", files.len());
    }
}

/// The settings file of log shipping.
pub fn log_settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(file) = LogFile::parse(text) {
        let _ = file.apply(LogSettings::new(Layout::Compact));
    }
}

/// The parsers that a pod's annotation names.
pub fn line_parsers(bytes: &[u8]) {
    for parser in parser::built_in().iter().filter(|parser| parser.name != "json") {
        if let Some(object) = parser.object(bytes) {
            let _: serde::de::IgnoredAny = serde_json::from_str(&object).expect("an object is JSON");
            assert!(object.starts_with('{'), "{}: no object: {object}", parser.name);
        }
    }
}

/// What the kubelet answers.
pub fn kubelet_summary(bytes: &[u8]) {
    let _ = kubelet::container_files(bytes);
}

/// What a scraped pod answers, and the rules for it.
pub fn scrape_text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = scrape::Rules::parse(text);
    let samples: Vec<_> = scrape::parse(text).collect();
    assert!(samples.len() <= text.lines().count(), "a sample a line at most");
    assert!(samples.iter().all(|sample| !sample.name.is_empty()), "a sample without a name");
}

/// What pods send to the statsd port: one packet a paragraph.
pub fn statsd_packets(bytes: &[u8]) {
    let mut statsd = Statsd::default();
    for packet in bytes.split(|byte| *byte == 0) {
        statsd.packet(packet);
    }
    for document in statsd.documents(1_700_000_000_000, &[("NodeName", "n")]) {
        let document: serde_json::Value = serde_json::from_str(&document).expect("a document is JSON");
        let metrics = document["CloudWatchMetrics"].as_array().or_else(|| document["_aws"]["CloudWatchMetrics"].as_array());
        assert!(metrics.is_some_and(|metrics| !metrics.is_empty()), "a document that names no metric: {document}");
    }
}
