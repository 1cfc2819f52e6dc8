use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::*;
use crate::{
    Authority, Credentials, Role,
    tests::{issue, valid},
};

const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn takes(role: Role, name: &str) -> Rule {
    Rule::of("fleet", role, Some([name.parse().expect("a name")].into()))
}

fn authority(at: &Path) -> Authority {
    Authority::init(at, "fleet", valid()).expect("an authority")
}

type Met = (io::Result<(Stream<DuplexStream>, Identity)>, io::Result<(Stream<DuplexStream>, Identity)>);

async fn meet(dials: &Credentials, admits: Rule, accepts: &Credentials, and_admits: Rule) -> Met {
    let (near, far) = duplex(4 << 10);
    let (dials, accepts) = (dials.current().0, accepts.current().0);
    tokio::join!(dial(near, HERE, &dials, admits), accept(far, &accepts, and_admits))
}

#[tokio::test]
async fn both_know_who_the_other_is_and_what_is_said_comes_through() {
    let at = tempfile::tempdir().expect("a directory");
    let authority = authority(&at.path().join("pki"));
    let agent = issue(&authority, at.path(), "a", Role::Agent, valid());
    let controller = issue(&authority, at.path(), "c", Role::Controller, valid());
    let (dialled, accepted) =
        meet(&agent, takes(Role::Controller, "c"), &controller, takes(Role::Agent, "a")).await;
    let ((mut near, c), (mut far, a)) = (dialled.expect("dialled"), accepted.expect("accepted"));
    assert_eq!(
        (c.to_string(), a.to_string()),
        ("spiffe://fleet/controller/c".into(), "spiffe://fleet/agent/a".into())
    );
    let said = vec![7; 100_000];
    let mut heard = vec![0; said.len()];
    let (sent, got) = tokio::join!(
        async {
            near.write_all(&said).await?;
            near.flush().await
        },
        far.read_exact(&mut heard)
    );
    sent.expect("sent");
    assert_eq!((got.expect("heard"), heard), (said.len(), said));
}

#[tokio::test]
async fn the_one_that_is_refused_hears_why_with_its_first_read() {
    let at = tempfile::tempdir().expect("a directory");
    let authority = authority(&at.path().join("pki"));
    let agent = issue(&authority, at.path(), "a", Role::Agent, valid());
    let controller = issue(&authority, at.path(), "c", Role::Controller, valid());
    let (dialled, accepted) =
        meet(&agent, takes(Role::Controller, "c"), &controller, takes(Role::Operator, "a")).await;
    let said = accepted.expect_err("it was taken").to_string();
    assert!(said.contains("its role is agent, and operator is needed here"), "{said}");
    let (mut near, _) = dialled.expect("it has not been judged yet");
    let heard = near.read(&mut [0]).await.expect_err("it was answered");
    assert_eq!(heard.kind(), io::ErrorKind::PermissionDenied);
    assert!(heard.to_string().contains("its role or its name is not allowed there"), "{heard}");
    // The other way round.
    let (dialled, accepted) =
        meet(&agent, takes(Role::Controller, "d"), &controller, takes(Role::Agent, "a")).await;
    let said = dialled.expect_err("it was taken").to_string();
    assert!(said.contains("it is spiffe://fleet/controller/c, and not d"), "{said}");
    let heard = accepted.expect_err("it was answered").to_string();
    assert!(heard.contains("its role or its name is not allowed there"), "{heard}");
}

#[tokio::test]
async fn garbage_is_no_handshake() {
    let at = tempfile::tempdir().expect("a directory");
    let authority = authority(&at.path().join("pki"));
    let controller = issue(&authority, at.path(), "c", Role::Controller, valid());
    let (mut near, far) = duplex(4 << 10);
    let own = controller.current().0;
    let (_, accepted) = tokio::join!(
        async {
            drop(near.write_all(b"GET / HTTP/1.1\r\n\r\n").await);
            drop(near.read_to_end(&mut Vec::new()).await);
        },
        accept(far, &own, takes(Role::Agent, "a"))
    );
    let said = accepted.expect_err("it was taken").to_string();
    assert!(said.contains("speaks no TLS"), "{said}");
}
