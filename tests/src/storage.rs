//! A host with storage pools, each a file system on a loop device of its own, and a program in a volume.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rswap_agent::{control::SwapVolumeEvent, swap::storage::StorageReport};

use crate::{
    Fleet, Host, HostOptions,
    loop_device::{FileSystem, LoopDevice},
    moves::program,
    rounds,
    served_disk::Speed,
    steps::{Follower, Place},
    wait_for,
};

/// How long a program may take for what a scenario waits for.
const LIMIT: Duration = Duration::from_secs(40);
/// Looks at what a program has open, and the time between two of them: it opens files for a moment.
const LOOKS: usize = 20;
const NAP: Duration = Duration::from_millis(3);

/// For as long a further move waits until what an earlier one left is removed.
const REFUSED_AFTER: Duration = Duration::from_secs(10);

/// A pool's disk.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// How many bytes it has.
    pub bytes: u64,
    /// What is on it.
    pub file_system: FileSystem,
    /// It is served by this process, so fast: it can be made slower, to fail, and to vanish.
    pub served: Option<Speed>,
}

impl Disk {
    /// A file, with an ext4.
    pub fn of(bytes: u64) -> Self {
        Self { bytes, file_system: FileSystem::Ext4, served: None }
    }

    /// A file, with another file system.
    pub fn with(file_system: FileSystem, bytes: u64) -> Self {
        Self { file_system, ..Self::of(bytes) }
    }

    /// One that can be made slow, and to fail. Until then it is as fast as memory.
    pub fn that_can_fail(bytes: u64) -> Self {
        Self::slow(bytes, Speed::default())
    }

    /// One that is slow.
    pub fn slow(bytes: u64, speed: Speed) -> Self {
        Self { served: Some(speed), ..Self::of(bytes) }
    }

    fn make(&self, directory: &Path) -> anyhow::Result<LoopDevice> {
        let Some(speed) = self.served else {
            return LoopDevice::create_as(directory, self.bytes, self.file_system);
        };
        let disk = LoopDevice::create_served(directory, self.bytes, self.file_system)?;
        disk.set_speed(speed)?;
        Ok(disk)
    }
}

/// What happens to a disk.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// Every request fails, reads as well, from one on that is so many behind this moment.
    Fails(u64),
    /// It is pulled out, and unmounted.
    Vanishes,
    /// It answers nothing for a minute, and nobody is told that it failed.
    Hangs,
}

impl End {
    /// Strikes it.
    pub fn strike(self, disk: &LoopDevice) -> anyhow::Result<()> {
        match self {
            Self::Fails(after) => disk.fail_after(after),
            Self::Vanishes => disk.vanish(),
            Self::Hangs => disk.set_speed(Speed::of(Duration::from_secs(60))),
        }
    }
}

/// The pools.
const NAMES: [&str; 4] = ["one", "two", "three", "four"];

/// The scene. Dropped in this order: the instance uses the disks.
#[derive(Debug)]
pub struct StorageScene {
    /// The host.
    pub host: Host,
    /// The program's log.
    pub log: PathBuf,
    /// Where the program sees its volume `data`.
    pub path: PathBuf,
    /// Where it sees its other volumes, by their names.
    pub others: Vec<(&'static str, PathBuf)>,
    /// The disks: of the pools `one`, `two`, and so on.
    pub disks: Vec<LoopDevice>,
    /// The network; the last to go, with the host's logs.
    pub fleet: Fleet,
}

impl StorageScene {
    /// Starts a host whose pools have so many bytes each.
    pub fn set<const N: usize>(bytes: [u64; N]) -> anyhow::Result<Self> {
        Self::set_on(bytes.map(Disk::of), 3000)
    }

    /// Starts a host whose pools are on such disks. Instances may stand still for so many milliseconds.
    pub fn set_on<const N: usize>(of_pools: [Disk; N], max_unavailability_ms: u64) -> anyhow::Result<Self> {
        let options = HostOptions { max_unavailability_ms, ..HostOptions::default() };
        Self::set_with(of_pools, [""; N], options)
    }

    /// The same with further lines of each pool's configuration, and further options.
    pub fn set_with<const N: usize>(
        of_pools: [Disk; N],
        lines: [&str; N],
        options: HostOptions,
    ) -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let scratch = fleet.scratch().to_owned();
        let (mut disks, mut more) = (Vec::new(), options.more.clone());
        for (name, (disk, lines)) in NAMES.into_iter().zip(of_pools.into_iter().zip(lines)) {
            let directory = scratch.join(name);
            fs::create_dir(&directory)?;
            let disk = disk.make(&directory)?;
            more += &disk.pool(name, lines);
            disks.push(disk);
        }
        let host = fleet.host("a", &HostOptions { more, ..options })?;
        let (log, path) = (scratch.join("program.log"), scratch.join("mounted"));
        Ok(Self { host, log, path, others: Vec::new(), disks, fleet })
    }

    /// The names of its volumes, and where the program sees them.
    fn volumes(&self) -> Vec<(&'static str, &Path)> {
        let others = self.others.iter().map(|(name, path)| (*name, path.as_path()));
        std::iter::once(("data", self.path.as_path())).chain(others).collect()
    }

    /// From here on the program, which is still to be started, has another volume.
    pub fn add_volume(&mut self, name: &'static str) {
        self.others.push((name, self.fleet.scratch().join(format!("mounted-{name}"))));
    }

    /// Starts `programs/NAME.py LOG VOLUMES... ARGUMENTS...` as the instance `worker`.
    pub fn python(&self, name: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let program = program(&format!("{name}.py"));
        let directories = self.volumes().into_iter().map(|(_, path)| path);
        let paths = [&program, &self.log].into_iter().map(PathBuf::as_path).chain(directories);
        let words: Vec<String> = paths.map(|path| path.to_string_lossy().into_owned()).collect();
        let words: Vec<&str> = std::iter::once("python3").chain(words.iter().map(String::as_str)).collect();
        self.run(&[&words, arguments].concat())?;
        self.goes_on()
    }

    /// Starts a command as the instance `worker`, with its volumes.
    pub fn run(&self, command: &[&str]) -> anyhow::Result<()> {
        self.run_with(&[], command)
    }

    /// The same, with further options of `rswap run`.
    pub fn run_with(&self, options: &[&str], command: &[&str]) -> anyhow::Result<()> {
        let volumes: Vec<String> =
            self.volumes().iter().map(|(name, path)| format!("{name}:{}", path.display())).collect();
        let volumes: Vec<&str> = volumes.iter().flat_map(|volume| ["--volume", volume]).collect();
        self.host.run("worker", &[&volumes, options].concat(), command)?;
        wait_for("the agent to watch the instance", LIMIT, || {
            Ok(self.host.has_instance("worker")?.then_some(()))
        })
    }

    /// Waits until something is copied to a pool.
    pub fn wait_for_copy(&self, pool: &str) -> anyhow::Result<()> {
        let directory = self.fleet.scratch().join(pool).join("mounted/rswap");
        wait_for("the copy to begin", LIMIT, || {
            let all = fs::read_dir(&directory).into_iter().flatten().flatten();
            let mut names = all.map(|entry| entry.file_name());
            Ok(names.any(|name| name.to_string_lossy().starts_with(".arr")).then_some(()))
        })
    }

    /// Waits for fifty further rounds.
    pub fn goes_on(&self) -> anyhow::Result<()> {
        rounds::wait_for_more(&self.log, 50, LIMIT)
    }

    /// The call that moves the volume to a pool.
    pub fn swap(&self, pool: &str) -> anyhow::Result<Command> {
        self.swap_of("data", pool)
    }

    /// The call that moves one of its volumes to a pool.
    pub fn swap_of(&self, volume: &str, pool: &str) -> anyhow::Result<Command> {
        self.host.rswap(&["swap", "worker", pool, "--volume", volume, "--json"])
    }

    /// Moves the volume: what it took, or why it stays. What is refused only at the moment is tried again.
    pub fn moved(&self, pool: &str) -> anyhow::Result<Result<StorageReport, String>> {
        self.moved_of("data", pool)
    }

    /// The same of one of its volumes.
    pub fn moved_of(&self, volume: &str, pool: &str) -> anyhow::Result<Result<StorageReport, String>> {
        let mut tries = 0;
        loop {
            tries += 1;
            let output = self.swap_of(volume, pool)?.output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            let last = text.lines().last().context("nothing was answered")?;
            match serde_json::from_str(last)? {
                SwapVolumeEvent::Done(report) => return Ok(Ok(report)),
                SwapVolumeEvent::Failed(error) if error.to_string().contains("try again") && tries < 5 => {}
                SwapVolumeEvent::Failed(error) => return Ok(Err(error.to_string())),
                SwapVolumeEvent::Progress(_) => anyhow::bail!("no last word: {text}"),
            }
        }
    }

    /// Moves the volume, and the program must go on there.
    pub fn moves(&self, pool: &str) -> anyhow::Result<StorageReport> {
        let report = self.moves_of("data", pool)?;
        self.is_on(Some(pool))?;
        Ok(report)
    }

    /// Moves one of its volumes, and the program must go on.
    pub fn moves_of(&self, volume: &str, pool: &str) -> anyhow::Result<StorageReport> {
        let report = self.moved_of(volume, pool)?.map_err(anyhow::Error::msg)?;
        println!("unavailable {:.1} ms: {:?}", report.unavailability_ms, report.freeze_steps_ms);
        self.goes_on()?;
        Ok(report)
    }

    /// The volume is on this pool's disk (or on none), whoever looks, and nowhere else.
    pub fn is_on(&self, pool: Option<&str>) -> anyhow::Result<()> {
        self.are_on(&[pool])
    }

    /// Each of its volumes is on the disk of its pool, whoever looks, and nowhere else.
    pub fn are_on(&self, pools: &[Option<&str>]) -> anyhow::Result<()> {
        let volumes = self.volumes();
        ensure!(volumes.len() == pools.len(), "it has {} volumes", volumes.len());
        let at = |name: &str| self.fleet.scratch().join(name).join("mounted");
        let mut known = Vec::new();
        for ((name, path), pool) in volumes.into_iter().zip(pools) {
            let place = self.place_of(name);
            let real = fs::canonicalize(&place)?;
            match pool {
                Some(pool) => ensure!(real.starts_with(at(pool)), "{name} is in {}", real.display()),
                None => ensure!(real == place, "{name} is in {}", real.display()),
            }
            for pid in self.host.pids("worker")? {
                let seen = fs::metadata(format!("/proc/{pid}/root{}", path.display()))?;
                ensure!(same(&seen, &fs::metadata(&real)?), "process {pid} sees another directory");
            }
            known.extend([place, real]);
        }
        let place = self.place();
        let mut found = Vec::new();
        let gone = wait_for("the other copies to go", LIMIT / 4, || {
            found.clear();
            for disk in &NAMES[..self.disks.len()] {
                let pool = at(disk).join("rswap/worker");
                found.extend(fs::read_dir(pool).into_iter().flatten().flatten().map(|entry| entry.path()));
                let unfinished = fs::read_dir(at(disk).join("rswap")).into_iter().flatten().flatten();
                found.extend(unfinished.map(|entry| entry.path()).filter(|path| !path.ends_with("worker")));
            }
            found.extend(
                fs::read_dir(place.parent().context("no parent")?)?.flatten().map(|entry| entry.path()),
            );
            found.retain(|path| !known.contains(path));
            let swaps =
                fs::read_dir(self.fleet.scratch().join("a/volume-swaps")).into_iter().flatten().flatten();
            found.extend(
                swaps.map(|entry| entry.path()).filter(|path| path.extension() == Some("json".as_ref())),
            );
            Ok(found.is_empty().then_some(()))
        });
        gone.with_context(|| format!("still there: {found:?}"))
    }

    /// The volume is in this pool, whatever is left in the other one.
    pub fn is_in(&self, pool: &str) -> anyhow::Result<()> {
        let real = fs::canonicalize(self.place())?;
        ensure!(real.starts_with(self.fleet.scratch().join(pool)), "it is in {}", real.display());
        for pid in self.host.pids("worker")? {
            let seen = fs::metadata(format!("/proc/{pid}/root{}", self.path.display()))?;
            ensure!(same(&seen, &fs::metadata(&real)?), "process {pid} sees another directory");
        }
        Ok(())
    }

    /// Where the agent looks for the volume.
    pub fn place(&self) -> PathBuf {
        self.place_of("data")
    }

    /// Where the agent looks for one of its volumes.
    pub fn place_of(&self, volume: &str) -> PathBuf {
        self.fleet.scratch().join("a/volumes/worker").join(volume)
    }

    /// Whether the instance is held by its cgroup.
    pub fn is_frozen(&self) -> anyhow::Result<bool> {
        Ok(fs::read_to_string(self.host.cgroup()?.join("worker/cgroup.freeze"))?.trim() == "1")
    }

    /// A move that has begun; what it says is for whoever waits for it.
    pub fn begin(&self, pool: &str) -> anyhow::Result<Child> {
        Ok(self.swap(pool)?.stdout(Stdio::piped()).spawn()?)
    }

    /// One whose agent stands still before `place`.
    pub fn stopped_before(&self, pool: &str, place: Place) -> anyhow::Result<Child> {
        let agent = self.host.agent_pid().context("no agent")?;
        let follower = Follower::start(agent, place, Signal::SIGSTOP)?;
        let swap = self.begin(pool)?;
        wait_for("the agent to be stopped", LIMIT, || {
            let stat = fs::read_to_string(format!("/proc/{agent}/stat"))?;
            Ok(stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T")).then_some(()))
        })?;
        ensure!(follower.has_struck()?, "it does not come to {place:?}");
        Ok(swap)
    }

    /// While what was copied to the disk of pool `to` can't be removed, a further move is refused, and soon.
    pub fn is_refused_meanwhile(&self, at: &str, to: &str) -> anyhow::Result<()> {
        let began = Instant::now();
        let Err(refused) = self.moved(to)? else { anyhow::bail!("it has moved") };
        let took = began.elapsed();
        println!("and then, after {took:?}: {refused}");
        ensure!(refused.contains("what an earlier swap of it left is still being removed"), "{refused}");
        ensure!(took > REFUSED_AFTER && took < 2 * REFUSED_AFTER, "it was refused after {took:?}");
        self.goes_on()?;
        self.is_in(at)
    }

    /// How many descriptors its processes have for longer than a moment.
    pub fn descriptors(&self) -> anyhow::Result<usize> {
        let mut all = 0;
        for pid in self.host.pids("worker")? {
            let mut least = usize::MAX;
            for _ in 0..LOOKS {
                least = least.min(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
                std::thread::sleep(NAP);
            }
            all += least;
        }
        Ok(all)
    }

    /// No process of the instance has a child that is none of its own.
    pub fn nothing_is_left(&self) -> anyhow::Result<()> {
        for pid in self.host.pids("worker")? {
            let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
            let low = maps
                .lines()
                .filter(|line| line.len() > 9 && line.starts_with("000") && line.as_bytes()[8] == b'-');
            ensure!(low.count() == 0, "process {pid} has a scratch mapping:\n{maps}");
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            for child in children.split_whitespace() {
                let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
                ensure!(!status.contains("State:\tZ"), "process {pid} has a zombie:\n{status}");
            }
        }
        Ok(())
    }
}

fn same(a: &fs::Metadata, b: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}
