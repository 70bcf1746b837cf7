//! The socket that carries the plugin's frames and gRPC: plugins and agents of another version, nonsense, callers that go away.
#![allow(clippy::unwrap_used, reason = "a failed set-up is a failed test, and the line says which")]

mod cni_support;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use cni_support::Site;
use stanchion_proto as wire;
use stanchion_proto::cni_client::CniClient;
use stanchion_proto::frame::{self, HEADER, MAGIC, Method};
use tonic::Code;

fn open(site: &Site) -> UnixStream {
    let stream = UnixStream::connect(site.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn read(stream: &mut UnixStream) -> (u8, Vec<u8>) {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).unwrap();
    let (code, length) = frame::header(header).unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (code, body)
}

fn code(reply: &(u8, Vec<u8>)) -> Code {
    Code::from(i32::from(reply.0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_socket_answers_frames_and_grpc() {
    let site = Site::start().await;
    let mut client = {
        let socket = site.socket();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        });
        CniClient::new(tonic::transport::Endpoint::from_static("http://agent").connect_with_connector(connector).await.unwrap())
    };
    assert!(client.status(wire::StatusRequest {}).await.unwrap().into_inner().ready);
    let mut stream = open(&site);
    stream.write_all(&MAGIC).unwrap();
    for _ in 0..2 {
        stream.write_all(&frame::encode(Method::Status as u8, &wire::StatusRequest {}).unwrap()).unwrap();
        let (code, body) = read(&mut stream);
        assert!(frame::reply::<wire::StatusReply>(code, &body).unwrap().ready);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_of_another_version_is_answered() {
    let site = Site::start().await;
    let mut stream = open(&site);
    stream.write_all(&MAGIC).unwrap();
    // A method and a field that this agent does not know.
    stream.write_all(&frame::encode(99, &wire::StatusRequest {}).unwrap()).unwrap();
    assert_eq!(code(&read(&mut stream)), Code::Unimplemented);
    let sandbox = wire::Sandbox { container_id: "later".into(), ..wire::Sandbox::default() };
    let mut request =
        frame::encode(Method::DelNetwork as u8, &wire::DelNetworkRequest { sandbox: Some(sandbox), ..Default::default() }).unwrap();
    request.extend_from_slice(&[0x9a, 0x06, 1, b'x']);
    let length = u32::try_from(request.len() - 4).unwrap();
    request[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&request).unwrap();
    let reply = read(&mut stream);
    assert_eq!(code(&reply), Code::Ok, "{}", String::from_utf8_lossy(&reply.1));
    assert_eq!(site.script.lock().unwrap().released[0].0, "later");
    // A message that is none, and another protocol altogether.
    stream.write_all(&[3, 0, 0, 0, Method::Status as u8, 0xff, 0xff]).unwrap();
    assert_eq!(code(&read(&mut stream)), Code::InvalidArgument);
    let mut other = open(&site);
    other.write_all(b"\0stncni9").unwrap();
    let reply = read(&mut other);
    assert_eq!(code(&reply), Code::Unimplemented);
    assert!(String::from_utf8_lossy(&reply.1).contains("stanchion-cni"), "it says what to do");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lengths_that_cannot_be_end_the_connection_and_nothing_else() {
    let site = Site::start().await;
    for length in [0u32, 1 << 30, u32::MAX] {
        let mut stream = open(&site);
        stream.write_all(&MAGIC).unwrap();
        stream.write_all(&[&length.to_le_bytes()[..], &[1]].concat()).unwrap();
        assert_eq!(code(&read(&mut stream)), Code::InvalidArgument, "{length}");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{length}: closed");
    }
    let pod = site.pod("a");
    site.add(&pod).await;
}
