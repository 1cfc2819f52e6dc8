//! A running instance, a tree of Linux processes, as the source of a migration.

use std::{
    collections::BTreeMap,
    num::NonZero,
    panic::resume_unwind,
    thread,
    time::{Duration, Instant},
};

use super::{
    guard::Guard,
    offer::{FileDigests, Requirements},
    source_process::SourceProcess,
    traits::{PAGE_SIZE, PageRange, SourceTask, TaskError, Written},
    volumes::SourceVolumes,
};
use crate::{
    instance::{
        Instance,
        affinity::{Choices, Processors},
        cgroup,
        network::settings::{Looking, Settings},
    },
    sys::mem::{self, RemoteAddr},
    tracee::{
        TraceeError,
        advice::{Advice, Reader},
        check,
        crew::Crew,
        descriptors::{self, Lock},
        files::Places,
        image::InstanceImage,
        layout::{InstanceLayout, ProcessLayout, segment_inode},
        leftovers, mounts,
        objects::{self, SourceObject},
        settle::Settling,
        snapshot::{self, Frozen},
        stopped::StoppedProcess,
        sysv::{self, Segment},
        tables,
        tcp::Held,
        tracker::{Span, WrittenSpans},
        tree::{self, INIT, Member, Node},
    },
};

/// Passes over the tree before processes that are made faster than they can be stopped are given up.
const MAX_PASSES: usize = 100;

/// How long connections that can't be carried may take to come to their end, the instance running: a round trip to a
/// far peer.
const SETTLING_LIMIT: Duration = Duration::from_millis(250);

/// How the network is taken from the instance during the freeze, and given back if the move fails.
pub trait Uplink {
    /// Makes ready for `detach`, the instance running: what takes long is done here.
    fn prepare(&mut self);
    /// Nothing reaches the instance any more, and nothing leaves it.
    fn detach(&mut self) -> Result<(), TaskError>;
    /// As before.
    fn attach(&mut self) -> Result<(), TaskError>;
    /// What came for the instance since `detach` goes to where it is now. What fails of it is lost, as it can be on any
    /// network.
    fn pass_on(&mut self);
}

/// An instance, as the engine sees it.
pub struct LinuxSource<U> {
    instance: Instance,
    uplink: U,
    processes: Vec<SourceProcess>,
    /// Holds those that are stopped.
    crew: Option<Crew>,
    zombies: Vec<Node>,
    objects: BTreeMap<u64, SourceObject>,
    files: FileDigests,
    places: Places,
    /// Which processors its threads chose, if a pool of this host limited them.
    chosen: Option<(Choices, Processors)>,
    volumes: SourceVolumes,
    next_space: u32,
    settling: Vec<Settling>,
    /// Reads what is asked of the memory of those that are stopped.
    advice: Option<Reader>,
    held: Held,
    /// What it has changed in its own network namespace, and who looks for that in the freeze.
    settings: Option<Settings>,
    looking: Option<Looking>,
    /// Locks on files, by pid and descriptor.
    locks: Vec<(i32, i32, Lock)>,
    frozen: bool,
    detached: bool,
    /// Held still by its cgroup: nothing of it runs when this process ends.
    parked: bool,
    guard: Option<Guard>,
    /// Ends the instance for good; given by the room that started it.
    end: Box<dyn FnMut() -> Result<(), TaskError>>,
}

impl<U: Uplink> LinuxSource<U> {
    /// Prepares to move `instance`; nothing is touched yet. `end` is called once, after the commit.
    ///
    /// # Errors
    /// What of the instance can't be carried, item by item.
    pub fn new(
        instance: Instance,
        uplink: U,
        places: Places,
        chosen: Option<(Choices, Processors)>,
        volumes: SourceVolumes,
        end: Box<dyn FnMut() -> Result<(), TaskError>>,
    ) -> Result<Self, TaskError> {
        for pid in tree::listed(&instance)? {
            match leftovers::remove(pid) {
                Err(_) if tree::has_ended(pid) => {}
                removed => removed?,
            }
        }
        check::require(&instance, &places)?;
        Ok(Self {
            instance,
            uplink,
            processes: Vec::new(),
            crew: None,
            zombies: Vec::new(),
            objects: BTreeMap::new(),
            files: FileDigests::new(places.clone()),
            places,
            chosen,
            volumes,
            next_space: 0,
            settling: Vec::new(),
            advice: None,
            held: Held::default(),
            settings: None,
            looking: None,
            locks: Vec::new(),
            frozen: false,
            detached: false,
            parked: false,
            guard: None,
            end,
        })
    }

    /// Has its freeze watched.
    pub fn guard_by(&mut self, guard: Guard) {
        self.guard = Some(guard);
    }

    /// Looks who is there. Processes that are new get a number; returns the numbers of those that are gone.
    fn look(&mut self) -> Result<Vec<u32>, TraceeError> {
        let members = tree::members(&self.instance)?;
        let living = members.iter().filter(|member| member.node.status.is_none());
        let living: Vec<_> = living.filter(|member| !tree::lends_memory(member, &members)).collect();
        self.zombies =
            members.iter().map(|member| member.node).filter(|node| node.status.is_some()).collect();
        let mut gone = Vec::new();
        self.processes.retain(|process| {
            let stays = living.iter().any(|member| member.pid == process.pid());
            if !stays {
                gone.push(process.space);
            }
            stays
        });
        let mut before = std::mem::take(&mut self.processes);
        for member in living {
            let process = match before.iter().position(|process| process.pid() == member.pid) {
                Some(at) => {
                    let mut process = before.swap_remove(at);
                    process.member = *member;
                    process
                }
                None => {
                    let space = self.next_space;
                    self.next_space += 1;
                    SourceProcess::new(space, *member)
                }
            };
            // In the tree's order: parents first.
            self.processes.push(process);
        }
        Ok(gone)
    }

    /// Opens the shared memory that came, and forgets what nobody maps any more; returns the numbers of the latter.
    fn look_for_objects(&mut self) -> Result<Vec<u32>, TraceeError> {
        let mut present = BTreeMap::new();
        for process in &self.processes {
            for mapping in process.mappings.iter().filter(|m| m.is_object() && !m.is_sysv()) {
                if let Some((what, remedy)) = mapping.obstacle() {
                    let text = format!("process {}: {what}: {remedy}", process.pid());
                    return Err(TraceeError::Unsupported(text));
                }
                let (_, known) =
                    present.entry(mapping.inode).or_insert_with(|| (process.pid(), mapping.clone()));
                if known.name != mapping.name {
                    let (one, other, inode) = (&known.name, &mapping.name, mapping.inode);
                    return Err(TraceeError::Unsupported(format!(
                        "{one} and {other} can't be told apart: both have inode {inode}, on two file systems"
                    )));
                }
            }
        }
        let main = self.main().map_or(0, SourceProcess::pid);
        let segments = match sysv::segments(main) {
            // The instance has ended.
            Err(_) if tree::has_ended(main) => Vec::new(),
            segments => segments.map_err(TraceeError::call("listing SysV shared memory", main))?,
        };
        let segments: BTreeMap<u64, Segment> =
            segments.into_iter().map(|segment| (segment_inode(segment.id), segment)).collect();
        let mut gone = Vec::new();
        self.objects.retain(|inode, object| {
            let stays = present.contains_key(inode) || segments.contains_key(inode);
            if !stays {
                gone.push(object.object.space);
            }
            stays
        });
        for (inode, (pid, mapping)) in present {
            if !self.objects.contains_key(&inode) {
                let space = objects::FIRST_SPACE + self.next_space;
                self.next_space += 1;
                self.objects.insert(inode, SourceObject::open(pid, &mapping, space)?);
            }
        }
        for (inode, segment) in segments {
            match self.objects.get_mut(&inode) {
                Some(known) => known.object.segment = Some(segment),
                None => {
                    let space = objects::FIRST_SPACE + self.next_space;
                    self.next_space += 1;
                    self.objects.insert(inode, SourceObject::open_segment(main, segment, space)?);
                }
            }
        }
        Ok(gone)
    }

    fn look_what_is_written(&mut self) -> Result<Written, TaskError> {
        let mut found = Written::default();
        // In the freeze nobody comes or goes.
        if !self.frozen {
            found.dropped.extend(self.look()?.into_iter().map(everything));
        }
        let mut ended = Vec::new();
        let looks = self.look_at_each();
        for (process, look) in self.processes.iter_mut().zip(looks) {
            let (written, replaced) = match look {
                Ok(taken) => taken,
                Err(_) if !self.frozen && tree::has_ended(process.pid()) => {
                    ended.push(process.space);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if replaced {
                found.dropped.push(everything(process.space));
            }
            self.files.add(&written.mappings)?;
            let populated = process.without_files_of(&self.volumes, written.populated, self.frozen)?;
            found.populated.extend(ranges(process.space, populated));
            found.dropped.extend(ranges(process.space, written.dropped));
        }
        self.processes.retain(|process| !ended.contains(&process.space));
        found.dropped.extend(ended.into_iter().map(everything));
        found.dropped.extend(self.look_for_objects()?.into_iter().map(everything));
        let pid = self.main().map_or(0, SourceProcess::pid);
        for object in self.objects.values_mut() {
            let (changed, dropped) = object.take_changed(pid)?;
            found.populated.extend(ranges(object.object.space, changed));
            found.dropped.extend(ranges(object.object.space, dropped));
        }
        Ok(found)
    }

    /// What each process wrote. Those that stand still are looked at side by side; one that runs may have to be stopped by
    /// this very thread.
    fn look_at_each(&mut self) -> Vec<Result<(WrittenSpans, bool), TraceeError>> {
        if !self.frozen {
            return self.processes.iter_mut().map(SourceProcess::take_written).collect();
        }
        let at_once = thread::available_parallelism().map_or(1, NonZero::get);
        let share = self.processes.len().div_ceil(at_once).max(1);
        thread::scope(|scope| {
            let workers: Vec<_> = self
                .processes
                .chunks_mut(share)
                .map(|chunk| {
                    scope.spawn(|| chunk.iter_mut().map(SourceProcess::take_written).collect::<Vec<_>>())
                })
                .collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        })
    }

    /// Has the threads that hold the processes do `work` on each.
    fn by_crew<R: Send + 'static>(
        &mut self,
        work: impl Fn(&mut SourceProcess) -> R + Send + Sync + 'static,
    ) -> Vec<R> {
        let crew = self.crew.get_or_insert_with(Crew::start);
        let processes = std::mem::take(&mut self.processes).into_iter().enumerate();
        let items = processes.map(|(at, mut process)| (*process.hand.get_or_insert(crew.hand(at)), process));
        let (processes, results) = crew.each(items.collect(), work);
        self.processes = processes;
        results
    }

    /// The image, but for what connections hold.
    fn capture(&mut self) -> Result<InstanceImage, TaskError> {
        let mut read = self.advice.take().ok_or("the instance is not frozen")?.finish();
        let advice = self.processes.iter().map(|process| {
            read.remove(&process.pid())
                .ok_or("what is asked of its memory was not read")?
                .map_err(TaskError::from)
        });
        let advice = advice.collect::<Result<Vec<Advice>, TaskError>>()?;
        let crew = self.crew.as_mut().ok_or("the instance is not frozen")?;
        let mut frozen = Vec::with_capacity(self.processes.len());
        for (process, advice) in self.processes.iter_mut().zip(advice) {
            let (Some(threads), Some(hand)) = (process.stopped.take(), process.hand) else {
                return Err("the instance is not frozen".into());
            };
            let (mappings, kernel_mappings) = (process.mappings.clone(), process.kernel_mappings().to_vec());
            let (space, member) = (process.space, process.member);
            frozen.push(Frozen { space, member, threads, hand, mappings, kernel_mappings, advice });
        }
        let (cgroup, zombies) = (&self.instance.cgroup, self.zombies.clone());
        let chosen = self.chosen.clone();
        let (frozen, image) = snapshot::capture_instance(crew, cgroup, frozen, zombies, &self.places, chosen);
        for (process, frozen) in self.processes.iter_mut().zip(frozen) {
            process.stopped = Some(frozen.threads);
        }
        let mut image = image?;
        if let Some(looking) = self.looking.take() {
            image.sysctls = looking.end()?;
        }
        Ok(image)
    }

    /// Lets go of those that are stopped.
    fn let_go(&mut self) {
        if self.crew.is_some() {
            self.by_crew(|process| process.stopped = None);
        }
    }

    fn process(&self, space: u32) -> Option<&SourceProcess> {
        self.processes.iter().find(|process| process.space == space)
    }

    /// Files in volumes are mapped at the destination when they are complete: in the freeze.
    fn layout_of(&self, process: &SourceProcess) -> ProcessLayout {
        let mut layout = process.layout();
        if !self.frozen {
            layout.layout.mappings.retain(|mapping| !self.volumes.hold(mapping));
        }
        layout
    }

    /// What is mounted must be what was offered, and all that is used must still be found by its path.
    fn require_same_mounts(&self) -> Result<(), TraceeError> {
        let mounts = self.volumes.mounts();
        mounts::require_same(&self.instance, mounts)?;
        for process in self.processes.iter().filter(|_| !mounts.is_empty()) {
            let (pid, init) = (process.pid(), self.instance.init_pid.unwrap_or_default());
            if let Some(item) = mounts::covered(init, pid, &process.mappings, mounts)?.first() {
                let text = format!("{item} of process {pid}: {}", mounts::HIDDEN);
                return Err(TraceeError::Unsupported(text));
            }
        }
        Ok(())
    }

    fn main(&self) -> Option<&SourceProcess> {
        self.processes.iter().find(|process| process.member.node.parent == INIT)
    }
}

fn ranges(space: u32, spans: Vec<Span>) -> impl Iterator<Item = PageRange> {
    let page = PAGE_SIZE as u64;
    spans.into_iter().map(move |span| PageRange {
        space,
        start: span.start,
        pages: (span.end - span.start) / page,
    })
}

/// All that an address space can hold.
fn everything(space: u32) -> PageRange {
    PageRange { space, start: 0, pages: 1 << 44 }
}

impl<U: Uplink> SourceTask for LinuxSource<U> {
    fn requirements(&mut self) -> Result<Vec<u8>, TaskError> {
        self.look()?;
        let members: Vec<Member> = self.processes.iter().map(|process| process.member).collect();
        let requirements = Requirements::of(&self.instance, &members, &mut self.files, &self.volumes)?;
        Ok(postcard::to_stdvec(&requirements)?)
    }

    fn start_tracking(&mut self) -> Result<(), TaskError> {
        // Each process is tracked from its first look on: `written` finds those too that are made later.
        if let (Some(init), Some(identity)) = (self.instance.init_pid, &self.instance.network) {
            self.settings = Some(Settings::of(init, identity)?);
        }
        Ok(())
    }

    fn layout(&mut self) -> Result<Vec<u8>, TaskError> {
        let pids: Vec<i32> = self.processes.iter().map(SourceProcess::pid).collect();
        let spaces: Vec<u32> = self.processes.iter().map(|process| process.space).collect();
        let tables = tables::of_processes(&pids, &spaces)?;
        let processes = self.processes.iter().zip(tables);
        let layout = InstanceLayout {
            processes: processes
                .map(|(process, tables)| ProcessLayout { tables, ..self.layout_of(process) })
                .collect(),
            objects: self.objects.values().map(|object| object.object.clone()).collect(),
            files: self.files.all(),
        };
        Ok(postcard::to_stdvec(&layout)?)
    }

    fn written(&mut self) -> Result<Written, TaskError> {
        if self.frozen {
            return self.look_what_is_written();
        }
        // Each process that is new is stopped for a moment.
        self.guard.as_ref().map_or(Ok(()), Guard::arm)?;
        let found = self.look_what_is_written();
        self.guard.as_ref().map_or(Ok(()), Guard::rest)?;
        found
    }

    fn copy_volumes(
        &mut self,
        last: bool,
        send: &mut dyn FnMut(&[u8]) -> Result<(), TaskError>,
    ) -> Result<(), TaskError> {
        let pids: Vec<i32> = self.processes.iter().map(SourceProcess::pid).collect();
        Ok(self.volumes.pass(last, &pids, send)?)
    }

    fn volume_digest(&self) -> u128 {
        self.volumes.digest()
    }

    fn read(&mut self, space: u32, addr: u64, buf: &mut [u8]) -> Result<usize, TaskError> {
        if let Some(object) = self.objects.values_mut().find(|object| object.object.space == space) {
            object.read(addr, buf)?;
            return Ok(buf.len());
        }
        let Some(pid) = self.process(space).map(SourceProcess::pid) else { return Ok(0) };
        let got = match mem::read(pid, RemoteAddr(addr), buf) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(0),
            got => got?,
        };
        let got = got - got % PAGE_SIZE;
        if got > 0 {
            return Ok(got);
        }
        // Memory that the program itself may not read is read all the same.
        match mem::ForcedMemory::open(pid)?.read_exact(RemoteAddr(addr), &mut buf[..PAGE_SIZE]) {
            Ok(()) => Ok(PAGE_SIZE),
            Err(_) => Ok(0),
        }
    }

    fn read_runs(&mut self, space: u32, runs: &mut [(u64, &mut [u8])]) -> Result<usize, TaskError> {
        let Some(pid) = self.process(space).map(SourceProcess::pid) else {
            // Shared memory, or gone: one run at a time.
            let [(addr, buf), ..] = runs else { return Ok(0) };
            return self.read(space, *addr, buf);
        };
        let mut pieces: Vec<_> = runs.iter_mut().map(|(addr, buf)| (RemoteAddr(*addr), &mut **buf)).collect();
        match mem::read_pieces(pid, &mut pieces) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(0),
            got => got.map(|got| got - got % PAGE_SIZE).map_err(Into::into),
        }
    }

    fn settle(&mut self) -> Result<(), TaskError> {
        self.uplink.prepare();
        self.crew.get_or_insert_with(Crew::start);
        self.guard.as_ref().map_or(Ok(()), Guard::arm)?;
        for process in &self.processes {
            match Settling::begin(process.pid()) {
                Err(_) if tree::has_ended(process.pid()) => {}
                begun => self.settling.push(begun?),
            }
        }
        let deadline = Instant::now() + SETTLING_LIMIT;
        for (number, settling) in self.settling.iter().enumerate() {
            // One that has ended meanwhile has nothing left to settle.
            let left = deadline.saturating_duration_since(Instant::now());
            let left = settling.wait(number == 0, left).unwrap_or_default();
            tracing::debug!(?left, "connections settled");
        }
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), TaskError> {
        self.frozen = true;
        let reader = Reader::start();
        for _ in 0..MAX_PASSES {
            self.look()?;
            if self.processes.iter().all(|process| process.stopped.is_some()) {
                self.advice = Some(reader);
                self.looking = self.settings.take().map(Settings::look);
                self.detached = true;
                self.uplink.detach()?;
                let living = |settling: &&Settling| self.processes.iter().any(|p| p.pid() == settling.pid());
                let mut living = self.settling.iter().filter(living).enumerate();
                return Ok(living.try_for_each(|(number, settling)| settling.require(number == 0))?);
            }
            let ask = reader.asker();
            let stops = self.by_crew(move |process| match process.stop() {
                Err(TraceeError::Gone(_)) => Ok(()),
                Ok(true) => {
                    ask(process.pid());
                    Ok(())
                }
                stopped => stopped.map(drop),
            });
            stops.into_iter().collect::<Result<(), _>>()?;
        }
        let text = format!("{} makes processes faster than they can be stopped", self.instance.name);
        Err(TraceeError::Unsupported(text).into())
    }

    fn snapshot(&mut self) -> Result<Vec<u8>, TaskError> {
        self.require_same_mounts()?;
        let mut image = self.capture()?;
        // No call can be made in it any more, and it stays still whatever becomes of this process: from here on it could
        // not use its connections.
        cgroup::freeze(&self.instance.cgroup, true)?;
        self.parked = true;
        // Threads are described in the order in which they were stopped.
        let tids: Vec<Vec<i32>> =
            self.processes.iter().flat_map(|p| &p.stopped).map(StoppedProcess::tids).collect();
        for (tids, described) in tids.iter().zip(&image.processes) {
            for (thread, descriptors) in described.task.open_files() {
                self.held.take(tids[thread], descriptors)?;
            }
        }
        for (tids, described) in tids.iter().zip(&mut image.processes) {
            for (thread, descriptors) in described.task.open_files_mut() {
                self.held.read(tids[thread], descriptors)?;
                for descriptor in descriptors.iter() {
                    let (tid, number) = (tids[thread], descriptor.numbers[0].0);
                    self.locks.extend(descriptor.locks.iter().map(|lock| (tid, number, *lock)));
                }
            }
        }
        // Let go by ptrace, and held by the cgroup: no thread runs in between.
        self.let_go();
        Ok(postcard::to_stdvec(&image)?)
    }

    fn seal(&mut self) -> Result<(), TaskError> {
        self.guard.as_ref().map_or(Ok(()), Guard::seal)
    }

    fn thaw(&mut self) -> Result<(), TaskError> {
        // The port first: a connection that goes on asks its peer at once what it has.
        let attached = if std::mem::take(&mut self.detached) { self.uplink.attach() } else { Ok(()) };
        self.held.release();
        self.locks.clear();
        self.settling.clear();
        self.advice = None;
        (self.settings, self.looking) = (None, None);
        self.let_go();
        self.processes.iter_mut().for_each(SourceProcess::release);
        self.frozen = false;
        let thawed = match std::mem::take(&mut self.parked) {
            true => cgroup::freeze(&self.instance.cgroup, false),
            false => Ok(()),
        };
        if let Some(guard) = &self.guard {
            guard.disarm();
        }
        self.uplink.pass_on();
        attached.and(thawed.map_err(TaskError::from))
    }

    fn give_way(&mut self) {
        for (pid, number, lock) in self.locks.drain(..) {
            if let Err(error) = descriptors::give_up(pid, number, lock) {
                tracing::error!(pid, number, %error, "a lock could not be given up");
            }
        }
    }

    fn destroy(&mut self) -> Result<(), TaskError> {
        self.uplink.pass_on();
        // Killed before it is let go: not one instruction of the source runs after the commit.
        (self.end)()?;
        // In repair mode to the end: the destination has the connections, and their peers hear nothing of this.
        self.held = Held::default();
        self.settling.clear();
        (self.frozen, self.parked) = (false, false);
        if let Some(guard) = &self.guard {
            guard.disarm();
        }
        self.let_go();
        self.processes.iter_mut().for_each(SourceProcess::release);
        Ok(())
    }
}
