//! Images that are images, and say what no source would: the destination refuses them, or restores them, and is as it was
//! afterwards.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use fastrand::Rng;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::{
    migrate::wire::{self, Frame, Tag, read_frame, write_frame},
    tracee::image::InstanceImage,
};
use rswap_tests::{
    Host,
    mangle_image::damaged,
    reason_to_skip,
    scene::{LIMIT, Scene, further},
    tls::Secured,
    wait_for,
};
use rswap_trust::Files;

/// Damaged images of each program; `RSWAP_IMAGE_CASES` makes it more, `RSWAP_IMAGE_SEED` begins elsewhere.
const CASES: u64 = 10;
/// How long the destination may take for one: more than a freeze may.
const PATIENCE: Duration = Duration::from_secs(20);
/// What an agent may need for all of them, in KiB, besides what it has needed for one that was not damaged.
const MEMORY_KIB: u64 = 64 << 10;

fn number(name: &str, usual: u64) -> anyhow::Result<u64> {
    std::env::var(name).map_or(Ok(usual), |text| text.parse().with_context(|| format!("{name} is no number")))
}

/// The processes of an instance that are not stopped: held still, so that its files stay as an image tells them.
struct Held(Vec<Pid>);

/// One that has ended is no error: those that go on before it may end it.
fn signal(pid: Pid, signal: Signal) -> anyhow::Result<()> {
    match kill(pid, signal) {
        Err(Errno::ESRCH) => Ok(()),
        sent => Ok(sent?),
    }
}

impl Held {
    fn still(host: &Host, name: &str) -> anyhow::Result<Self> {
        let runs = |pid: &i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
            !matches!(state, Some(Some('T' | 'Z')) | None)
        };
        let pids: Vec<Pid> = host.pids(name)?.into_iter().filter(runs).map(Pid::from_raw).collect();
        for &pid in &pids {
            signal(pid, Signal::SIGSTOP)?;
        }
        Ok(Self(pids))
    }

    fn go_on(self) -> anyhow::Result<()> {
        self.0.into_iter().try_for_each(|pid| signal(pid, Signal::SIGCONT))
    }
}

/// What a source says of instance `name`, from the Hello to the image. The instance stands still from that moment on.
fn recorded(scene: &Scene, name: &str) -> anyhow::Result<(Vec<Frame>, Held)> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let files = scene.b.files().clone();
    let listening = scene.a.netns().spawn("recorder", move || {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        sender.send(listener.local_addr()?)?;
        let mut stream = Secured::accepted(listener.accept()?.0, &files)?;
        stream.stream().set_read_timeout(Some(PATIENCE))?;
        let mut frames = vec![read_frame(&mut stream)?];
        write_frame(&mut stream, Tag::Hello, &frames[0].payload)?;
        loop {
            let frame = read_frame(&mut stream)?;
            match frame.tag {
                Tag::Offer => {
                    let (id, _) = wire::parse_offer(&frame.payload)?;
                    write_frame(&mut stream, Tag::Accept, &id.0.to_le_bytes())?;
                }
                Tag::RoundEnd => {
                    write_frame(&mut stream, Tag::RoundAck, &[])?;
                }
                _ => {}
            }
            let ends = frame.tag == Tag::Image;
            frames.push(frame);
            if ends {
                return Ok((frames, stream));
            }
        }
    })?;
    let address: SocketAddr = receiver.recv_timeout(LIMIT)?;
    let migration = scene.a.migrate(name, &address.to_string())?;
    match listening.join().map_err(|_| anyhow::anyhow!("the recorder panicked"))? {
        Ok((frames, stream)) => {
            // It is frozen, and takes the signal as soon as it is let go.
            let held = Held::still(&scene.a, name)?;
            drop(stream);
            let ended = migration.end()?;
            ensure!(ended.is_err(), "it went to nobody");
            Ok((frames, held))
        }
        Err(error) => Err(error.context(format!("{name} was not sent: {:?}", migration.end()?))),
    }
}

/// Says all of `frames` to the destination, the image being `image`, and breaks off; what it said to that.
fn said_to(
    destination: SocketAddr,
    files: &Files,
    frames: &[Frame],
    image: &[u8],
    random: &mut Rng,
) -> anyhow::Result<Result<(), String>> {
    let mut stream = Secured::dial(destination, files)?;
    stream.stream().set_read_timeout(Some(PATIENCE))?;
    let id = random.u128(..);
    let expect = |stream: &mut Secured, tag: Tag| -> anyhow::Result<Result<(), String>> {
        let frame = read_frame(stream)?;
        match frame.tag {
            found if found == tag => Ok(Ok(())),
            Tag::Abort => Ok(Err(String::from_utf8_lossy(&frame.payload).into_owned())),
            found => anyhow::bail!("{found:?} came where {tag:?} was due"),
        }
    };
    for frame in frames {
        let mut payload = frame.payload.clone();
        match frame.tag {
            Tag::Offer => payload[..wire::ID_BYTES].copy_from_slice(&id.to_le_bytes()),
            Tag::Image => payload = image.to_vec(),
            _ => {}
        }
        write_frame(&mut stream, frame.tag, &payload)?;
        let answer = match frame.tag {
            Tag::Hello => Tag::Hello,
            Tag::Offer => Tag::Accept,
            Tag::RoundEnd => Tag::RoundAck,
            Tag::Image => Tag::Verified,
            _ => continue,
        };
        match expect(&mut stream, answer).with_context(|| format!("after {:?}", frame.tag))? {
            Ok(()) => {}
            refused => return Ok(refused),
        }
    }
    // So the destination needs no journal of it.
    write_frame(&mut stream, Tag::Abort, b"that was all")?;
    Ok(Ok(()))
}

/// The same, from where the clients are.
fn replayed(
    scene: &Scene,
    destination: SocketAddr,
    frames: &[Frame],
    image: &[u8],
    mut random: Rng,
) -> anyhow::Result<Result<(), String>> {
    let (frames, image, files) = (frames.to_vec(), image.to_vec(), scene.a.files().clone());
    let replay = move || said_to(destination, &files, &frames, &image, &mut random);
    let said = scene.fleet.client.spawn("replay", replay)?;
    said.join().map_err(|_| anyhow::anyhow!("the replay panicked"))?
}

/// Waits until the destination has nothing of the instance.
fn nothing_is_left(scene: &Scene, name: &str, after: &str) -> anyhow::Result<()> {
    wait_for(&format!("nothing to be left after {after}"), PATIENCE, || {
        Ok((!scene.b.has_processes()? && !scene.b.cgroup()?.join(name).exists()).then_some(()))
    })
}

/// The most memory that a host's agent has had, in KiB.
fn peak_kib(host: &Host) -> anyhow::Result<u64> {
    let pid = host.agent_pid().context("no agent runs")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.split_whitespace().next().unwrap_or_default().parse()?)
}

/// Sends the image of `programs/NAME.py` with much damage, and moves the instance at last.
fn is_none_the_worse(test: &str, name: &str, options: &[&str], word: &str) -> anyhow::Result<()> {
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    // Other users work in it, too.
    let parent = tempfile::Builder::new().prefix("rswt").tempdir()?;
    fs::set_permissions(parent.path(), fs::Permissions::from_mode(0o755))?;
    let directory = parent.path().join("held");
    if name == "attributes" {
        fs::create_dir(&directory)?;
    }
    scene.python(name, options, &[&directory.to_string_lossy()])?;
    further(&scene.log, word, 1)?;
    let destination: SocketAddr = scene.b.migrate_address().parse()?;
    let (frames, held) = wait_for("what a source says", LIMIT, || {
        let (frames, held) = match recorded(&scene, name) {
            Ok(found) => found,
            Err(error) if format!("{error:#}").contains("try again") => return Ok(None),
            Err(error) => return Err(error),
        };
        let whole = &frames.last().context("nothing was said")?.payload;
        // Something in it may be of that moment only, such as a thread's file in /proc.
        let said = replayed(&scene, destination, &frames, whole, Rng::with_seed(u64::MAX))?;
        nothing_is_left(&scene, name, "the first try")?;
        match said {
            Err(reason) if ["try again", "/fdinfo/"].iter().any(|word| reason.contains(word)) => {
                held.go_on()?;
                Ok(None)
            }
            _ => Ok(Some((frames, held))),
        }
    })?;
    let whole = frames.last().context("nothing was said")?.payload.clone();
    let (image, rest) = postcard::take_from_bytes::<InstanceImage>(&whole)?;
    ensure!(rest.is_empty(), "the image is not understood");
    let (first, cases) = (number("RSWAP_IMAGE_SEED", 1)?, number("RSWAP_IMAGE_CASES", CASES)?);
    let (mut peak, mut restored, mut refused) = (0, 0, 0);
    for seed in (0..=cases).map(|case| if case == 0 { 0 } else { first + case - 1 }) {
        let random = Rng::with_seed(seed);
        // The first one is whole: it shows that the others are refused for their damage.
        let (bytes, what) = match seed {
            0 => (whole.clone(), "nothing".to_owned()),
            seed => {
                let (image, what) = damaged(&image, seed)?;
                (postcard::to_stdvec(&image)?, what)
            }
        };
        println!("seed {seed}: {what}");
        let began = Instant::now();
        let said = replayed(&scene, destination, &frames, &bytes, random);
        println!("    {said:?} after {:?}", began.elapsed());
        let log = scene.b.log()?;
        let panics: Vec<&str> = log.lines().filter(|line| line.contains("panicked at")).collect();
        ensure!(panics.is_empty(), "seed {seed}: {what}: the destination panicked: {panics:?}");
        match said.with_context(|| format!("seed {seed}: {what}"))? {
            Ok(()) => restored += 1,
            Err(reason) if seed == 0 => anyhow::bail!("the image itself is refused: {reason}"),
            Err(_) => refused += 1,
        }
        nothing_is_left(&scene, name, &format!("seed {seed}: {what}"))?;
        ensure!(!scene.b.has_instance(name)?, "seed {seed}: {what}: it is listed at the destination");
        if seed == 0 {
            peak = peak_kib(&scene.b)?;
        }
        let now = peak_kib(&scene.b)?;
        ensure!(now < peak + MEMORY_KIB, "seed {seed}: {what}: it took {} KiB", now - peak);
    }
    println!("{restored} were restored and {refused} refused, with {} KiB more", peak_kib(&scene.b)? - peak);
    ensure!(scene.b.open_journals()?.is_empty(), "{:?}", scene.b.open_journals()?);
    // Nothing of it has harmed either host.
    held.go_on()?;
    scene.moved(name, &scene.a, &scene.b)?;
    further(&scene.log, word, 2)
}

#[test]
fn damaged_images_of_files_and_sockets() -> anyhow::Result<()> {
    let test = "damaged_images_of_files_and_sockets";
    is_none_the_worse(test, "files", &[], "checked")?;
    is_none_the_worse(test, "unix_sockets", &[], "checked")
}

#[test]
fn damaged_images_of_events_and_addresses() -> anyhow::Result<()> {
    let test = "damaged_images_of_events_and_addresses";
    is_none_the_worse(test, "events", &[], "checked")?;
    let address = ["--net", "10.88.0.10/24,gw=10.88.0.1", "--net", "fd88::10/64,gw=fd88::1"];
    is_none_the_worse(test, "internet", &address, "checked")
}

#[test]
fn damaged_images_of_trees_and_rights() -> anyhow::Result<()> {
    let test = "damaged_images_of_trees_and_rights";
    is_none_the_worse(test, "tables", &[], "checked")?;
    is_none_the_worse(test, "ipc", &[], "checked")?;
    is_none_the_worse(test, "attributes", &[], "credentials")
}
