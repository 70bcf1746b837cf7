//! Leaves a release for the agent that is away.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use stanchion_core::cni::spool::{Spooled, VERSION};
use stanchion_core::cni::{CniError, ErrorCode};
use stanchion_proto::Sandbox;

/// Writes the release; it is on disk when this returns.
pub(crate) fn leave(directory: &Path, sandbox: &Sandbox, reason: &str) -> Result<(), CniError> {
    let spooled = Spooled {
        version: VERSION,
        network_name: sandbox.network_name.clone(),
        container_id: sandbox.container_id.clone(),
        if_name: sandbox.if_name.clone(),
        pod_namespace: sandbox.pod_namespace.clone(),
        pod_name: sandbox.pod_name.clone(),
        reason: reason.to_owned(),
    };
    write(directory, &spooled).map_err(|error| {
        let directory = directory.display();
        CniError::new(ErrorCode::Io, format!("the agent is away and the release cannot be left for it in {directory}: {error}"))
    })
}

fn write(directory: &Path, spooled: &Spooled) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let name = spooled.file_name();
    let temporary = directory.join(format!(".{name}"));
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(spooled)?)?;
    file.sync_all()?;
    fs::rename(&temporary, directory.join(name))?;
    File::open(directory)?.sync_all()
}
