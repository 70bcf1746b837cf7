//! Which sandbox holds which endpoint slot, in a file so that the next agent finds the kernel's records again; and in which directions
//! it is policed, which an agent of another layout does not find in its maps.
//!
//! The file is replaced by rename without fsync: what it describes dies with the kernel's maps, so it need only survive
//! this process.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stanchion_core::ids::{ContainerId, PodName};
use stanchion_core::policy::image::Slot;
use stanchion_ebpf_abi::ENDPOINT_SLOTS;

use super::files::ENDPOINTS;
use super::handle::{ActivateIf, ActivateRequest};

/// Bumped when the file's meaning changes; another version is refused, not guessed at.
const VERSION: u32 = 1;

/// A sandbox's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sandbox {
    pub(super) slot: u16,
    pub(super) pod: PodName,
    pub(super) pod_uid: String,
    pub(super) container_id: ContainerId,
    pub(super) interfaces: Vec<HostInterface>,
}

/// A host veth of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostInterface {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) ipv4: Option<Ipv4Addr>,
    pub(super) ipv6: Option<Ipv6Addr>,
}

impl HostInterface {
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.map(IpAddr::from).into_iter().chain(self.ipv6.map(IpAddr::from))
    }
}

impl From<ActivateIf> for HostInterface {
    fn from(ActivateIf { host_if_name, host_if_index, ipv4, ipv6 }: ActivateIf) -> Self {
        Self { name: host_if_name, index: host_if_index, ipv4, ipv6 }
    }
}

impl Sandbox {
    pub(super) fn slot(&self) -> Slot {
        Slot(self.slot)
    }

    /// The pod's addresses; the positions are those of the endpoint's image.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        self.interfaces.iter().flat_map(HostInterface::addresses).collect()
    }
}

/// What is written, and what is read.
#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    endpoints: Vec<&'a Sandbox>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    policed: &'a BTreeMap<u16, [bool; 2]>,
}

#[derive(Deserialize)]
struct File {
    version: u32,
    endpoints: Vec<Sandbox>,
    #[serde(default)]
    policed: BTreeMap<u16, [bool; 2]>,
}

/// The slot table.
#[derive(Debug)]
pub(super) struct Slots {
    path: PathBuf,
    sandboxes: BTreeMap<u16, Sandbox>,
    /// Ingress and egress of the sandboxes that are policed in one of them.
    policed: BTreeMap<u16, [bool; 2]>,
    /// Freed slots whose flows are not collected yet: a new pod must not find them.
    cooling: Vec<u16>,
    /// Where the search for a free one goes on, so that a slot rests as long as possible.
    next: u16,
}

impl Slots {
    /// Reads the table; none is an empty one.
    pub(super) fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(ENDPOINTS);
        let (sandboxes, mut policed) = match fs::read(&path) {
            Ok(bytes) => {
                let file: File = serde_json::from_slice(&bytes)?;
                if file.version != VERSION {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("version {} is not {VERSION}", file.version)));
                }
                (file.endpoints, file.policed)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(state_dir)?;
                (Vec::new(), BTreeMap::new())
            }
            Err(error) => return Err(error),
        };
        let sandboxes: BTreeMap<u16, Sandbox> = sandboxes.into_iter().map(|sandbox| (sandbox.slot, sandbox)).collect();
        policed.retain(|slot, _| sandboxes.contains_key(slot));
        let next = sandboxes.last_key_value().map_or(1, |(slot, _)| slot + 1);
        Ok(Self { path, sandboxes, policed, cooling: Vec::new(), next })
    }

    pub(super) fn path(&self) -> String {
        self.path.display().to_string()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sandbox> {
        self.sandboxes.values()
    }

    pub(super) fn len(&self) -> usize {
        self.sandboxes.len()
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&Sandbox> {
        self.sandboxes.get(&slot.0)
    }

    pub(super) fn of(&self, container: &ContainerId) -> Option<&Sandbox> {
        self.iter().find(|sandbox| sandbox.container_id == *container)
    }

    /// Gives the sandbox the slot it has, or a free one; not in the file before [`Self::save`].
    pub(super) fn assign(&mut self, request: ActivateRequest) -> Option<Sandbox> {
        let slot = match self.of(&request.container_id) {
            Some(sandbox) => sandbox.slot,
            None => self.free()?,
        };
        let ActivateRequest { pod, pod_uid, container_id, endpoints, shares_ingress: _ } = request;
        let interfaces = endpoints.into_iter().map(HostInterface::from).collect();
        let sandbox = Sandbox { slot, pod, pod_uid, container_id, interfaces };
        self.sandboxes.insert(slot, sandbox.clone());
        Some(sandbox)
    }

    fn free(&mut self) -> Option<u16> {
        let last = u16::try_from(ENDPOINT_SLOTS - 1).expect("slots fit");
        let next = self.next.clamp(1, last);
        let slot = (next..=last).chain(1..next).find(|slot| !self.sandboxes.contains_key(slot) && !self.cooling.contains(slot))?;
        self.next = if slot == last { 1 } else { slot + 1 };
        Some(slot)
    }

    /// Takes a sandbox out; its slot cools until [`Self::cooled`].
    pub(super) fn release(&mut self, slot: Slot) -> Option<Sandbox> {
        let sandbox = self.sandboxes.remove(&slot.0)?;
        self.policed.remove(&slot.0);
        self.cooling.push(slot.0);
        Some(sandbox)
    }

    /// The directions in which sandboxes are policed.
    pub(super) fn policed(&self) -> impl Iterator<Item = (Slot, [bool; 2])> {
        self.policed.iter().map(|(slot, directions)| (Slot(*slot), *directions))
    }

    /// Those of one.
    pub(super) fn policed_in(&self, slot: Slot) -> [bool; 2] {
        self.policed.get(&slot.0).copied().unwrap_or_default()
    }

    /// Notes the directions in which a sandbox is policed; true if that is new. Not in the file before [`Self::save`].
    pub(super) fn note_policed(&mut self, slot: Slot, directions: [bool; 2]) -> bool {
        if directions == [false; 2] || !self.sandboxes.contains_key(&slot.0) {
            return self.policed.remove(&slot.0).is_some();
        }
        self.policed.insert(slot.0, directions) != Some(directions)
    }

    /// The flows of the slots that cool are gone.
    pub(super) fn cooled(&mut self) {
        self.cooling.clear();
    }

    /// Writes the table.
    pub(super) fn save(&self) -> io::Result<()> {
        let file = Written { version: VERSION, endpoints: self.sandboxes.values().collect(), policed: &self.policed };
        let fresh = self.path.with_extension("json.new");
        fs::write(&fresh, serde_json::to_vec(&file)?)?;
        fs::rename(&fresh, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(container: &str) -> ActivateRequest {
        let endpoint = ActivateIf { host_if_name: "eni1".to_owned(), host_if_index: 9, ipv4: Some(Ipv4Addr::new(10, 0, 0, 1)), ipv6: None };
        ActivateRequest {
            pod: PodName::new("x", container),
            pod_uid: String::new(),
            container_id: ContainerId::from(container),
            endpoints: vec![endpoint],
            shares_ingress: false,
        }
    }

    /// A file as version 1 was first written: a later agent finds every pod's slot, so that its pinned records stay in force.
    #[test]
    fn a_file_of_version_1_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = r#"{"version":1,"endpoints":[{"slot":55,"pod":{"namespace":"default","name":"client-rsd7n"},"pod_uid":"a2265c5e","container_id":"1abdb40a004f","interfaces":[{"name":"eni8e44dbbb1ae","index":59,"ipv4":"10.0.0.6","ipv6":null}]}]}"#;
        fs::write(dir.path().join("endpoints.json"), file).unwrap();
        let slots = Slots::open(dir.path()).unwrap();
        let interface = HostInterface { name: "eni8e44dbbb1ae".into(), index: 59, ipv4: Some(Ipv4Addr::new(10, 0, 0, 6)), ipv6: None };
        let expected = Sandbox {
            slot: 55,
            pod: PodName::new("default", "client-rsd7n"),
            pod_uid: "a2265c5e".into(),
            container_id: ContainerId::from("1abdb40a004f"),
            interfaces: vec![interface],
        };
        assert_eq!(slots.of(&ContainerId::from("1abdb40a004f")), Some(&expected));
        slots.save().unwrap();
        let written = fs::read_to_string(dir.path().join("endpoints.json")).unwrap();
        assert_eq!(written, file, "what is written now is read by the agent before");
    }

    #[test]
    fn a_sandbox_keeps_its_slot_over_repetition_and_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut slots = Slots::open(dir.path()).unwrap();
        let first = slots.assign(request("a")).unwrap();
        let second = slots.assign(request("b")).unwrap();
        assert_ne!(first.slot, second.slot);
        assert_eq!(slots.assign(request("a")).unwrap(), first);
        slots.save().unwrap();
        let again = Slots::open(dir.path()).unwrap();
        assert_eq!(again.of(&ContainerId::from("b")), Some(&second));
        assert_eq!(again.len(), 2);
    }

    #[test]
    fn the_directions_in_which_a_sandbox_is_policed_go_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut slots = Slots::open(dir.path()).unwrap();
        let [a, b] = ["a", "b"].map(|name| slots.assign(request(name)).unwrap().slot());
        assert!(slots.note_policed(a, [true, false]) && !slots.note_policed(a, [true, false]));
        assert!(slots.note_policed(b, [true, true]) && !slots.note_policed(Slot(99), [true, true]));
        slots.save().unwrap();
        let mut slots = Slots::open(dir.path()).unwrap();
        assert_eq!(slots.policed().collect::<Vec<_>>(), [(a, [true, false]), (b, [true, true])]);
        slots.release(a);
        assert!(slots.note_policed(b, [false; 2]));
        slots.save().unwrap();
        assert_eq!(Slots::open(dir.path()).unwrap().policed().count(), 0);
    }

    #[test]
    fn a_freed_slot_is_given_again_only_after_cooling_and_none_is_given_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut slots = Slots::open(dir.path()).unwrap();
        let all: Vec<u16> = (1..ENDPOINT_SLOTS).map(|i| slots.assign(request(&i.to_string())).unwrap().slot).collect();
        let mut distinct = all.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(slots.assign(request("more")), None);
        slots.release(Slot(7)).unwrap();
        assert_eq!(slots.assign(request("more")), None);
        slots.cooled();
        assert_eq!(slots.assign(request("more")).unwrap().slot, 7);
    }

    #[test]
    fn another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("endpoints.json"), br#"{"version":2,"endpoints":[]}"#).unwrap();
        assert_eq!(Slots::open(dir.path()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
