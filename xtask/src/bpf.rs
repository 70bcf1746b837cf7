//! The eBPF toolchain and object.

use std::path::Path;

use anyhow::Result;

/// Installs what is missing.
pub(crate) fn ensure_toolchain() -> Result<()> {
    Ok(())
}

/// Builds the object.
pub(crate) fn build(_root: &Path) -> Result<()> {
    Ok(())
}
