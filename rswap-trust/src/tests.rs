//! Both ends of real handshakes, over loopback.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use crate::{
    Authority, AuthorityError, Channel, Credentials, CredentialsError, Files, Name, Role, Rule, Validity,
    authority::Issued,
};

const HOUR: Duration = Duration::from_secs(3600);
const LIMIT: Duration = Duration::from_secs(10);

pub(crate) fn valid() -> Validity {
    let now = SystemTime::now();
    Validity { from: now - HOUR, until: now + 24 * HOUR }
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

pub(crate) fn issue(authority: &Authority, at: &Path, who: &str, role: Role, valid: Validity) -> Credentials {
    let Issued { certificate, key, ca, .. } =
        authority.issue(&name(who), role, valid, &at.join(who), true).expect("a certificate");
    Credentials::open(Files { ca, certificate, key }).expect("credentials")
}

fn rule(names: Option<&[&str]>) -> Rule {
    Rule::of("fleet", Role::Agent, names.map(|names| names.iter().map(|one| name(one)).collect()))
}

/// What each end says: who the other is and what came of it, or why not. The one that dials says `words`.
fn meet(
    dials: &Credentials,
    admits: Rule,
    accepts: &Credentials,
    and_admits: Rule,
    words: &[u8],
) -> (Result<String, String>, Result<String, String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("its address");
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let (stream, _) = listener.accept().expect("a caller");
            stream.set_read_timeout(Some(LIMIT)).expect("a limit");
            let mut channel = Channel::accepted(stream, &accepts.current().0, and_admits).expect("a channel");
            let who = channel.shake_hands().map_err(|error| error.to_string());
            let mut heard = vec![0; words.len()];
            let answered = who.and_then(|who| {
                channel.read_exact(&mut heard).map_err(|error| error.to_string())?;
                channel.write_all(&heard).map_err(|error| error.to_string())?;
                Ok(who.to_string())
            });
            channel.close();
            // What nobody has read would turn the alert into a reset.
            let _ = channel.stream().shutdown(std::net::Shutdown::Write);
            let _ = channel.stream_mut().read_to_end(&mut Vec::new());
            answered
        });
        let stream = TcpStream::connect(address).expect("a connection");
        stream.set_read_timeout(Some(LIMIT)).expect("a limit");
        let mut channel =
            Channel::dialled(stream, address.ip(), &dials.current().0, admits).expect("a channel");
        let who = channel.shake_hands().map_err(|error| error.to_string());
        let mut heard = Vec::new();
        let answered = who.and_then(|who| {
            channel.write_all(words).map_err(|error| error.to_string())?;
            channel.read_to_end(&mut heard).map_err(|error| error.to_string())?;
            assert_eq!(heard, words);
            Ok(who.to_string())
        });
        drop(channel);
        (answered, accepting.join().expect("the accepting end"))
    })
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

#[test]
fn both_ends_know_each_other_and_everything_arrives() {
    let at = directory();
    let authority = Authority::init(&at.path().join("ca"), "fleet", valid()).expect("an authority");
    let a = issue(&authority, at.path(), "a", Role::Agent, valid());
    let b = issue(&authority, at.path(), "b.example.org", Role::Agent, valid());
    let words: Vec<u8> = (0..3_000_000_u64).map(|number| ((number * number) >> 7) as u8).collect();
    let (a_says, b_says) = meet(&a, rule(Some(&["b.example.org"])), &b, rule(None), &words[..60_000]);
    assert_eq!(a_says.as_deref(), Ok("spiffe://fleet/agent/b.example.org"));
    assert_eq!(b_says.as_deref(), Ok("spiffe://fleet/agent/a"));
    let (a_says, b_says) = meet(&a, rule(None), &b, rule(Some(&["a"])), &words[..1]);
    assert_eq!((a_says.is_ok(), b_says.is_ok()), (true, true));
}

#[test]
fn each_end_refuses_the_wrong_one_and_both_hear_why() {
    let at = directory();
    let authority = Authority::init(&at.path().join("ca"), "fleet", valid()).expect("an authority");
    let other = Authority::init(&at.path().join("other"), "fleet", valid()).expect("an authority");
    let now = SystemTime::now();
    let a = issue(&authority, at.path(), "a", Role::Agent, valid());
    let b = issue(&authority, at.path(), "b", Role::Agent, valid());
    let person = issue(&authority, at.path(), "person", Role::Operator, valid());
    let stranger = issue(&other, at.path(), "stranger", Role::Agent, valid());
    let past = Validity { from: now - 2 * HOUR, until: now - HOUR };
    let late = issue(&authority, at.path(), "late", Role::Agent, past);
    let early = Validity { from: now + HOUR, until: now + 2 * HOUR };
    let early = issue(&authority, at.path(), "early", Role::Agent, early);

    // Whoever accepts refuses whoever dials.
    for (dials, names, here, there) in [
        (
            &person,
            None,
            "its role is operator, and agent is needed",
            "its role or its name is not allowed there",
        ),
        (&a, Some(&["b", "c"][..]), "it is spiffe://fleet/agent/a, and not one of b, c", "not allowed there"),
        (&late, None, "has expired", "has expired there"),
        (&early, None, "is not valid yet", "is not valid yet"),
    ] {
        let (there_said, here_said) = meet(dials, rule(None), &b, rule(names), b"words");
        let (there_said, here_said) = (there_said.expect_err(here), here_said.expect_err(here));
        assert!(here_said.contains(here), "{here_said}");
        assert!(there_said.contains(there), "{there_said}");
    }
    // Whoever dials refuses whoever accepts.
    for (accepts, names, here, there) in [
        (&person, None, "its role is operator", "its role or its name is not allowed there"),
        (&b, Some(&["c"][..]), "it is spiffe://fleet/agent/b, and not c", "not allowed there"),
        (
            &stranger,
            None,
            "was not issued by an authority",
            "not issued by an authority that is trusted there",
        ),
        (&late, None, "has expired", "has expired there"),
        (&early, None, "is not valid yet", "is not valid yet"),
    ] {
        let (here_said, there_said) = meet(&a, rule(names), accepts, rule(None), b"words");
        let (there_said, here_said) = (there_said.expect_err(here), here_said.expect_err(here));
        assert!(here_said.contains(here), "{here_said}");
        assert!(there_said.contains(there), "{there_said}");
    }
    let (said, _) = meet(&stranger, rule(None), &b, rule(None), b"words");
    assert!(
        said.expect_err("a stranger").contains("was not issued by an authority"),
        "the first to look says it"
    );
}

#[test]
fn a_rotation_is_three_steps_and_no_pair_is_cut_off_in_between() {
    let at = directory();
    let ca = at.path().join("ca");
    let old = Authority::init(&ca, "fleet", valid()).expect("an authority");
    let a = issue(&old, at.path(), "a", Role::Agent, valid());
    let b = issue(&old, at.path(), "b", Role::Agent, valid());
    let both = || {
        for (one, other) in [(&a, &b), (&b, &a)] {
            let (said, answered) = meet(one, rule(None), other, rule(None), b"words");
            assert!(said.is_ok() && answered.is_ok(), "{said:?}, {answered:?}");
        }
    };
    let bring =
        |who: &str| std::fs::copy(ca.join("ca.pem"), at.path().join(who).join("ca.pem")).expect("a copy");
    assert!(matches!(Authority::finish_rotation(&ca), Err(AuthorityError::Rotation(_))));
    let new = Authority::rotate(&ca, valid()).expect("a rotation");
    assert!(matches!(Authority::rotate(&ca, valid()), Err(AuthorityError::Rotation(_))));
    both();
    bring("a");
    both();
    bring("b");
    both();
    // The credentials are those that were opened at first: they notice.
    drop(issue(&new, at.path(), "a", Role::Agent, valid()));
    both();
    drop(issue(&new, at.path(), "b", Role::Agent, valid()));
    both();
    Authority::finish_rotation(&ca).expect("the end");
    bring("a");
    both();
    bring("b");
    both();
    // Nobody trusts the old one any more.
    let late = issue(&old, at.path(), "late", Role::Agent, valid());
    bring("late");
    let (_, said) = meet(&late, rule(None), &b, rule(None), b"words");
    assert!(said.expect_err("the old authority is trusted").contains("authority"));
}

#[test]
fn a_rotation_that_was_interrupted_goes_on_and_never_ends_with_the_old_key() {
    let at = directory();
    let ca = at.path().join("ca");
    let read = |name: &str| std::fs::read(ca.join(name)).expect(name);
    drop(Authority::init(&ca, "fleet", valid()).expect("an authority"));
    let (old, of_the_old) = (read("authority.pem"), read("ca.pem"));
    drop(Authority::rotate(&ca, valid()).expect("a rotation"));
    let (new, both) = (read("authority.pem"), read("ca.pem"));
    let of_the_new = &both[of_the_old.len()..];
    let next = ca.join("authority.pem.next");
    let interrupted = |bundle: &[u8], key_is_there: bool| {
        std::fs::write(ca.join("authority.pem"), &old).expect("written");
        std::fs::write(ca.join("ca.pem"), bundle).expect("written");
        if key_is_there {
            std::fs::write(&next, &new).expect("written");
        }
    };
    // Before the bundle: it begins anew, with another key.
    interrupted(&of_the_old, true);
    assert!(matches!(Authority::finish_rotation(&ca), Err(AuthorityError::Rotation(_))));
    assert_eq!((read("authority.pem"), read("ca.pem")), (old.clone(), of_the_old.clone()));
    interrupted(&of_the_old, true);
    drop(Authority::rotate(&ca, valid()).expect("a rotation"));
    assert!(![&old, &new].contains(&&read("authority.pem")) && !next.exists());
    assert!(read("ca.pem").starts_with(&of_the_old) && read("ca.pem") != both);
    // In the middle of a file: what is there of it is in nobody's way.
    interrupted(&of_the_old, false);
    std::fs::write(ca.join("authority.pem.next.new"), "-----BEGIN").expect("written");
    std::fs::write(ca.join("ca.pem.new"), "-----BEGIN").expect("written");
    drop(Authority::rotate(&ca, valid()).expect("a rotation"));
    drop(Authority::finish_rotation(&ca).expect("the end"));
    // After the bundle: the key that it names signs.
    interrupted(&both, true);
    drop(Authority::rotate(&ca, valid()).expect("a rotation"));
    assert_eq!((read("authority.pem"), read("ca.pem")), (new.clone(), both.clone()));
    assert!(!next.exists());
    drop(Authority::finish_rotation(&ca).expect("the end"));
    assert_eq!((read("authority.pem"), read("ca.pem")), (new.clone(), of_the_new.to_vec()));
    // The end does not come with the beginning: no host has a certificate of the new key.
    interrupted(&both, true);
    assert!(matches!(Authority::finish_rotation(&ca), Err(AuthorityError::Rotation(_))));
    assert_eq!((read("authority.pem"), read("ca.pem")), (new.clone(), both.clone()));
    drop(Authority::finish_rotation(&ca).expect("the end"));
    assert_eq!(read("ca.pem"), of_the_new);
    // The new key is lost: the old one is not made the only one that is trusted.
    interrupted(&both, false);
    assert!(matches!(Authority::finish_rotation(&ca), Err(AuthorityError::Rotation(_))));
    assert_eq!((read("authority.pem"), read("ca.pem")), (old.clone(), both.clone()));
}

#[test]
fn files_that_cannot_be_used_leave_the_old_ones_in_use() {
    let at = directory();
    let authority = Authority::init(&at.path().join("ca"), "fleet", valid()).expect("an authority");
    let a = issue(&authority, at.path(), "a", Role::Agent, valid());
    assert_eq!(a.current().1, None);
    let certificate = at.path().join("a/certificate.pem");
    let good = std::fs::read(&certificate).expect("the certificate");
    std::fs::write(&certificate, "half a certifi").expect("written");
    let (loaded, problem) = a.current();
    assert_eq!(loaded.identity.name, name("a"));
    assert!(problem.expect("a problem").contains("certificate.pem"));
    // Another's, to which the key does not belong.
    drop(issue(&authority, at.path(), "b", Role::Agent, valid()));
    std::fs::copy(at.path().join("b/certificate.pem"), &certificate).expect("a copy");
    let (loaded, problem) = a.current();
    assert_eq!(loaded.identity.name, name("a"));
    assert!(problem.is_some());
    std::fs::write(&certificate, good).expect("written");
    assert_eq!(a.current().1, None);
    // Of a key that is refused only the mode changes, and in the meantime there is another authority to trust.
    let before = a.current().0;
    let key = at.path().join("a/key.pem");
    let open = |mode| std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).expect("chmod");
    open(0o644);
    assert!(a.current().1.expect("a problem").contains("chmod 600"));
    let other = Authority::init(&at.path().join("other"), "fleet", valid()).expect("an authority");
    let c = issue(&other, at.path(), "c", Role::Agent, valid());
    let trusted = [at.path().join("a/ca.pem"), at.path().join("c/ca.pem")].map(std::fs::read);
    let trusted = trusted.map(|read| read.expect("an authority")).concat();
    for who in ["a", "c"] {
        std::fs::write(at.path().join(who).join("ca.pem"), &trusted).expect("written");
    }
    assert!(a.current().1.is_some());
    assert!(std::sync::Arc::ptr_eq(&before, &a.current().0));
    open(0o600);
    assert_eq!(a.current().1, None);
    let (said, answered) = meet(&a, rule(None), &c, rule(None), b"words");
    assert!(said.is_ok() && answered.is_ok(), "{said:?}, {answered:?}");
}

#[test]
fn keys_are_for_their_owner_and_nothing_is_overwritten() {
    let at = directory();
    let ca = at.path().join("ca");
    let authority = Authority::init(&ca, "fleet", valid()).expect("an authority");
    let mode = |path: &Path| path.metadata().expect("its mode").permissions().mode() & 0o7777;
    drop(issue(&authority, at.path(), "a", Role::Agent, valid()));
    let key = at.path().join("a/key.pem");
    assert_eq!(mode(&ca), 0o700);
    assert_eq!(mode(&ca.join("authority.pem")), 0o600);
    assert_eq!(mode(&key), 0o600);
    let before = std::fs::read(ca.join("authority.pem")).expect("the authority");
    assert!(matches!(Authority::init(&ca, "fleet", valid()), Err(AuthorityError::Exists { .. })));
    assert_eq!(std::fs::read(ca.join("authority.pem")).expect("the authority"), before);
    let again = authority.issue(&name("a"), Role::Agent, valid(), &at.path().join("a"), false);
    assert!(matches!(again, Err(AuthorityError::Exists { .. })));

    let open = |mode| std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).expect("chmod");
    let files = || Files {
        ca: at.path().join("a/ca.pem"),
        certificate: at.path().join("a/certificate.pem"),
        key: key.clone(),
    };
    open(0o604);
    assert!(matches!(Credentials::open(files()), Err(CredentialsError::Open { .. })));
    open(0o640);
    assert!(Credentials::open(files()).is_ok());
    let open_directory = at.path().join("open");
    std::fs::create_dir(&open_directory).expect("a directory");
    std::fs::set_permissions(&open_directory, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    assert!(matches!(Authority::init(&open_directory, "fleet", valid()), Err(AuthorityError::Open { .. })));
    let link = at.path().join("link");
    std::os::unix::fs::symlink(&ca, &link).expect("a link");
    for link in [link.clone(), link.join("")] {
        let led = authority.issue(&name("b"), Role::Agent, valid(), &link, true);
        assert!(matches!(led, Err(AuthorityError::Directory { .. })), "{led:?}");
    }
    let given = at.path().join("given");
    std::fs::create_dir(&given).expect("a directory");
    std::fs::set_permissions(&given, std::fs::Permissions::from_mode(0o700)).expect("chmod");
    // Only root can give it away.
    if std::os::unix::fs::chown(&given, Some(65_534), None).is_ok() {
        let made = Authority::init(&given, "fleet", valid());
        assert!(matches!(made, Err(AuthorityError::Directory { .. })), "{made:?}");
    }
    assert!(Authority::init(&at.path().join("x"), "Not A Domain", valid()).is_err());
}
