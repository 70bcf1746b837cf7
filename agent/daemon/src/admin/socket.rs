//! The Unix socket: root only, by its mode and by the peer's credentials.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use futures_util::Stream;
use tokio::net::{UnixListener, UnixStream};
use tracing::warn;

/// A socket that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Some step of making it.
    #[error("{operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Another agent answers there.
    #[error("another agent serves {0}: stop it first, or give this one another --socket")]
    InUse(PathBuf),
}

/// Listens at the path with mode 0600 in a directory of mode 0755. A socket file that nobody answers is replaced.
///
/// # Errors
/// The directory or the socket cannot be made, or somebody answers there already.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let io = |operation| {
        let path = path.to_owned();
        move |source| SocketError::Io { operation, path, source }
    };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(io("make the directory of"))?;
    }
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(SocketError::InUse(path.to_owned()));
        }
        std::fs::remove_file(path).map_err(io("remove the stale socket"))?;
    }
    let listener = UnixListener::bind(path).map_err(io("listen at"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io("restrict"))?;
    Ok(listener)
}

/// Connections whose peer is root; others are closed with a warning.
pub fn root_connections(listener: UnixListener) -> impl Stream<Item = std::io::Result<UnixStream>> {
    futures_util::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == 0 => return Some((Ok(stream), listener)),
                    Ok(peer) => warn!(uid = peer.uid(), pid = peer.pid(), "refused a connection: only root may ask"),
                    Err(error) => warn!(%error, "refused a connection: its credentials cannot be read"),
                },
                // EMFILE and the like pass; tonic goes on accepting after an error.
                Err(error) => {
                    warn!(%error, "accept");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/agent.sock");
        drop(bind(&path).unwrap());
        let listener = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(SocketError::InUse(_))));
        drop(listener);
    }

    /// Past the file's mode, which keeps everybody else away already.
    #[tokio::test]
    async fn a_peer_that_is_not_root_is_closed_without_an_answer() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = directory.path().join("agent.sock");
        let listener = bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let connections = root_connections(listener);
        let mut connections = std::pin::pin!(connections);
        // Debian's perl-base is always there. It ends when its connection is closed.
        let script =
            "socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die $!; connect($s, sockaddr_un($ARGV[0])) or die $!; print read($s, my $b, 1)";
        let mut nobody = tokio::process::Command::new("perl");
        nobody.args(["-MSocket", "-e", script]).arg(&path).uid(65_534).gid(65_534).kill_on_drop(true);
        let refused = tokio::select! {
            output = nobody.output() => output.unwrap(),
            _ = connections.next() => panic!("the connection was taken"),
        };
        assert!(refused.status.success(), "{}", String::from_utf8_lossy(&refused.stderr));
        assert_eq!(refused.stdout, b"0", "nothing was said to it");
        let _root = UnixStream::connect(&path).await.unwrap();
        assert!(connections.next().await.unwrap().is_ok());
    }
}
