//! An instance, a tree of Linux processes, that is being built as the destination of a migration.

mod side_by_side;
mod tree;

use std::{collections::BTreeMap, os::fd::AsFd, time::Instant};

use rswap_trust::Name;

use self::{side_by_side::Job, tree::make_beside_or_below};
use super::{
    offer::{self, HostTraits, Objection, Requirements},
    recovery::Particulars,
    traits::{DestinationTask, PAGE_SIZE, PageRange, TaskError},
    volumes,
};
use crate::{
    instance::{Instance, Origin, arrival::Arrival, cgroup},
    profile::doctor,
    sys::clock::Clocks,
    tracee::{
        TraceeError,
        descriptors::{Restorer, Surroundings},
        files::Places,
        image::InstanceImage,
        layout::{InstanceLayout, ProcessLayout},
        link::Link,
        mounts::{self, Memory, Mounts},
        needs::{self, Case},
        objects::{BuiltObject, FIRST_SPACE},
        rebuild::Parked,
        space::{SharedMemory, Space},
        sysv,
        tables::Tables,
        terminals::{self, Terminals},
        tree::{INIT, Node},
    },
    units::UnixMillis,
    volume::built::BuiltVolume,
};

/// Most shared memory that a layout may ask for. It takes room only when it is written.
const SHARED_LIMIT_BYTES: u64 = 1 << 40;

/// Where arriving instances are put; given by the wiring.
pub trait Reception {
    /// What of these stands against taking an instance in here, found by looking only.
    fn objections(&self, requirements: &Requirements) -> Result<Vec<Objection>, TaskError>;

    /// Makes the cgroup and the namespaces with their init, which is to make a stub with pid `inner_pid`, whose clocks
    /// are ahead of the kernel's by `offsets`, and its file systems in memory, mounted nowhere.
    fn receive(
        &mut self,
        instance: &Instance,
        memories: &[Memory],
        inner_pid: i32,
        offsets: Option<Clocks>,
    ) -> Result<Arrival, TaskError>;

    /// The instance runs here, and is in the registry.
    fn arrived(&mut self, instance: &Instance);
}

/// The instance under construction, as the engine sees it.
pub struct LinuxDestination<R> {
    reception: R,
    /// Where it comes from, if the link says it.
    source: Option<Name>,
    arrival: Option<Arrival>,
    main_pid: i32,
    /// The source runs under the same kernel.
    same_kernel: bool,
    /// What the files of the layouts must have been compared with already.
    compared: BTreeMap<String, u128>,
    /// What is to be mounted, until it is.
    mounts: Option<Mounts>,
    places: Places,
    /// The digest of what has arrived of files, if it was taken already.
    volume_digest: Option<u128>,
    processes: Vec<BuiltProcess>,
    objects: BTreeMap<u64, BuiltObject>,
    parked: Option<Parked>,
    terminals: Terminals,
}

/// One process under construction.
struct BuiltProcess {
    number: u32,
    node: Node,
    /// Whose tables it is to have.
    tables: Tables,
    space: Space,
}

impl<R: Reception> LinuxDestination<R> {
    /// Waits for an offer of the host of this name.
    pub fn new(reception: R, source: Option<Name>) -> Self {
        Self {
            reception,
            source,
            arrival: None,
            main_pid: 0,
            same_kernel: false,
            compared: BTreeMap::new(),
            mounts: None,
            places: Places::default(),
            volume_digest: None,
            processes: Vec::new(),
            objects: BTreeMap::new(),
            parked: None,
            terminals: Terminals::default(),
        }
    }

    /// Everything that stands against taking it in.
    fn all_objections(&self, requirements: &Requirements) -> Result<Vec<Objection>, TaskError> {
        let mut found = self.reception.objections(requirements)?;
        found.extend(requirements.objections()?);
        let case = Case {
            own_address: requirements.instance.network.is_some(),
            other_clocks: clock_offsets(requirements)?.is_some(),
        };
        let lacking = needs::lacking(&doctor::migration_features(), case);
        found.extend(lacking.into_iter().map(|(item, reason)| Objection::new(item, reason)));
        Ok(found)
    }

    fn space(&mut self, number: u32) -> Result<&mut Space, TaskError> {
        let found = self.processes.iter_mut().find(|process| process.number == number);
        found.map(|process| &mut process.space).ok_or_else(|| format!("there is no process {number}").into())
    }

    fn object(&mut self, number: u32) -> Result<&mut BuiltObject, TaskError> {
        let found = self.objects.values_mut().find(|object| object.object.space == number);
        found.ok_or_else(|| format!("there is no shared memory {number}").into())
    }

    /// Ends the stubs of processes that have ended at the source.
    fn end_those_not_in(&mut self, layout: &InstanceLayout) -> Result<(), TaskError> {
        let stays = |process: &BuiltProcess| layout.processes.iter().any(|p| p.space == process.number);
        while let Some(at) = self.processes.iter().position(|process| !stays(process)) {
            let ended = self.processes.remove(at);
            ended.space.end()?;
            // Children of the init are collected by it.
            if let Some(parent) = self.processes.iter_mut().find(|p| p.node.pid == ended.node.parent) {
                parent.space.reap(ended.node.pid)?;
            }
        }
        Ok(())
    }

    fn make(&mut self, wanted: &ProcessLayout) -> Result<(), TaskError> {
        let node = wanted.node;
        let arrival = self.arrival.as_ref().ok_or("nothing has been prepared")?;
        let mut space = if node.parent == INIT && node.pid == self.main_pid && self.processes.is_empty() {
            Space::take(arrival.stub_pid, &wanted.kernel_mappings)?
        } else if self.has_lost_its_session(node) {
            self.make_orphan(wanted)?
        } else {
            make_beside_or_below(
                &mut self.processes,
                node,
                Some(wanted.tables),
                Some(&wanted.kernel_mappings),
            )?
        };
        if node.session == node.pid {
            space.start_session()?;
        }
        if let Some(terminal) = wanted.terminal {
            self.terminals.control(space.remote(), terminal)?;
        }
        let (number, tables) = (wanted.space, wanted.tables);
        self.processes.push(BuiltProcess { number, node, tables, space });
        Ok(())
    }

    /// The digest of what has arrived of files, which is complete from then on.
    fn complete_volumes(&mut self) -> Result<u128, TaskError> {
        if let Some(digest) = self.volume_digest {
            return Ok(digest);
        }
        let arrival = self.arrival.as_mut().ok_or("nothing has been prepared")?;
        Ok(*self.volume_digest.insert(volumes::complete(arrival)?))
    }

    /// Makes the mounts that the instance had made, once.
    fn make_mounts(&mut self) -> Result<(), TaskError> {
        let Some(mounts) = self.mounts.take().filter(|mounts| !mounts.is_empty()) else { return Ok(()) };
        // As long as nothing is mounted in what has arrived, and hides some of it.
        self.complete_volumes()?;
        let arrival = self.arrival.as_ref().ok_or("nothing has been prepared")?;
        let memories: Vec<_> = arrival.memories.iter().filter_map(BuiltVolume::memory).collect();
        let memories: Vec<_> = memories.into_iter().map(|memory| memory.mount().as_fd()).collect();
        let stub = self.processes.first_mut().ok_or("there is no process")?.space.remote();
        Ok(mounts::make(&mounts, &self.places.volumes, &memories, stub, &arrival.link)?)
    }

    fn resize_objects(&mut self, layout: &InstanceLayout) -> Result<(), TaskError> {
        let total: u64 = layout.objects.iter().map(|object| object.bytes).fold(0, u64::saturating_add);
        if total > SHARED_LIMIT_BYTES {
            return Err(refuse(format!("{total} bytes of shared memory are more than any host has")));
        }
        let pid = self.arrival.as_ref().ok_or("nothing has been prepared")?.stub_pid;
        let wanted = |inode: &u64| layout.objects.iter().any(|object| object.inode == *inode);
        self.objects.iter().filter(|(inode, _)| !wanted(inode)).try_for_each(|(_, gone)| gone.remove(pid))?;
        self.objects.retain(|inode, _| wanted(inode));
        for object in &layout.objects {
            match self.objects.get_mut(&object.inode) {
                Some(built) => built.resize(object)?,
                None => drop(self.objects.insert(object.inode, BuiltObject::make(pid, object)?)),
            }
        }
        Ok(())
    }

    /// Sets what the pseudo-terminals were, before anybody is in their foreground groups, who would get signals.
    fn restore_terminals(&mut self, image: &InstanceImage) -> Result<(), TaskError> {
        let pid = self.processes.first().ok_or("there is no process")?.space.pid();
        for (number, terminal) in image.terminals() {
            self.terminals.restore(pid, number, terminal)?;
        }
        Ok(())
    }

    /// Sets the foreground group of each terminal that controls a session, and compares who is controlled by which.
    fn set_foreground_groups(&mut self, image: &InstanceImage) -> Result<(), TaskError> {
        for process in &mut self.processes {
            let described = image.processes.iter().find(|described| described.space == process.number);
            let wanted = described.and_then(|described| described.terminal);
            if terminals::controlling(process.space.pid())? != wanted {
                let text = format!(
                    "process {} got its terminal after its children were made: try again",
                    process.node.pid
                );
                return Err(refuse(text));
            }
            let leads = process.node.session == process.node.pid;
            let terminal = image.terminals().find(|(number, _)| leads && Some(*number) == wanted);
            if let Some((number, terminal)) = terminal.filter(|(_, terminal)| terminal.foreground != 0) {
                terminals::set_foreground(process.space.remote(), number, terminal.foreground)?;
            }
        }
        Ok(())
    }
}

fn refuse(text: String) -> TaskError {
    TraceeError::Unsupported(text).into()
}

/// By how much the instance's clocks must be ahead of this kernel's, so that they go on; `None` for not at all.
///
/// Between kernels that were started at different times it is reckoned from the clocks at the offer. What the offer took on
/// its way is missing then, but less than the freeze: the clocks never go back.
fn clock_offsets(requirements: &Requirements) -> Result<Option<Clocks>, TaskError> {
    let offsets = match HostTraits::here()?.boot_id == requirements.host.boot_id {
        true => requirements.clock_offsets,
        false => requirements.clocks.minus(Clocks::of_this_kernel()?),
    };
    Ok(Some(offsets).filter(|offsets| *offsets != Clocks::default()))
}

impl<R: Reception> DestinationTask for LinuxDestination<R> {
    fn objections(&mut self, requirements: &[u8]) -> Result<Vec<Objection>, TaskError> {
        self.all_objections(&postcard::from_bytes(requirements)?)
    }

    fn prepare(&mut self, requirements: &[u8]) -> Result<Vec<u8>, TaskError> {
        let requirements: Requirements = postcard::from_bytes(requirements)?;
        // Before the comparison, which may take long.
        let offsets = clock_offsets(&requirements)?;
        offer::require_none(&self.all_objections(&requirements)?)?;
        let mounts = requirements.mounts;
        let arrival = self.reception.receive(
            &requirements.instance,
            &mounts.memories,
            requirements.main_pid,
            offsets,
        )?;
        self.places = Places::of(&requirements.instance, &mounts, Vec::new());
        self.mounts = Some(mounts);
        let mut instance = arrival.instance().clone();
        instance.origin = Origin::Migrated;
        let volumes = arrival.volume_moves();
        self.arrival = Some(arrival);
        self.main_pid = requirements.main_pid;
        self.same_kernel = HostTraits::here()?.boot_id == requirements.host.boot_id;
        self.compared = requirements.files;
        Particulars { instance, peer: None, peer_name: self.source.clone(), volumes }.to_bytes()
    }

    fn begin(&mut self) -> Result<(), TaskError> {
        let arrival = self.arrival.as_mut().ok_or("nothing has been prepared")?;
        arrival.begin()?;
        // A volume may take long before the first layout comes: no stub outlives an agent that is killed.
        Ok(Space::hold(arrival.stub_pid)?)
    }

    fn apply_layout(&mut self, layout: &[u8]) -> Result<(), TaskError> {
        let layout: InstanceLayout = postcard::from_bytes(layout)?;
        let fresh = layout.files.iter().filter(|(path, digest)| self.compared.get(*path) != Some(*digest));
        offer::require_none(&offer::compare_files(fresh))?;
        self.compared.clone_from(&layout.files);
        self.end_those_not_in(&layout)?;
        self.resize_objects(&layout)?;
        for known in &mut self.processes {
            let wanted = layout.processes.iter().find(|wanted| wanted.space == known.number);
            known.tables = wanted.map_or(known.tables, |wanted| wanted.tables);
        }
        let mut fresh = Vec::new();
        for wanted in &layout.processes {
            match self.processes.iter_mut().find(|process| process.number == wanted.space) {
                None => fresh.push(wanted),
                Some(known) => {
                    if wanted.node.session == wanted.node.pid && known.node.session != wanted.node.session {
                        known.space.start_session()?;
                    }
                    if let Some(terminal) = wanted.terminal {
                        self.terminals.control(known.space.remote(), terminal)?;
                    }
                    known.node = wanted.node;
                }
            }
        }
        self.make_all(fresh)?;
        self.separate()?;
        // Files in them are mapped by this layout.
        if self.arrival.as_ref().is_some_and(Arrival::is_filled) {
            self.make_mounts()?;
        }
        let link = &self.arrival.as_ref().ok_or("nothing has been prepared")?.link;
        let mut shared = SharedMemory { link, objects: &self.objects, places: &self.places };
        for wanted in &layout.processes {
            if let Some(process) = self.processes.iter_mut().find(|process| process.number == wanted.space) {
                process.space.apply(wanted, &mut shared)?;
            }
        }
        Ok(())
    }

    fn take_volume(&mut self, frame: &[u8]) -> Result<(), TaskError> {
        let arrival = self.arrival.as_mut().ok_or("nothing has been prepared")?;
        Ok(volumes::take(arrival, frame)?)
    }

    fn volume_digest(&mut self) -> Result<u128, TaskError> {
        self.complete_volumes()
    }

    fn write(&mut self, space: u32, addr: u64, data: &[u8]) -> Result<(), TaskError> {
        if space >= FIRST_SPACE {
            return Ok(self.object(space)?.write(addr, data)?);
        }
        Ok(self.space(space)?.write(addr, data)?)
    }

    fn discard(&mut self, range: &PageRange) -> Result<(), TaskError> {
        let end = range.start + range.pages * PAGE_SIZE as u64;
        // What is gone as a whole is gone with everything in it.
        if range.space >= FIRST_SPACE {
            return match self.object(range.space) {
                Ok(object) => Ok(object.discard(range.start, end)?),
                Err(_) => Ok(()),
            };
        }
        match self.space(range.space) {
            Ok(space) => Ok(space.discard(range.start, end)?),
            Err(_) => Ok(()),
        }
    }

    fn read(&mut self, space: u32, addr: u64, buf: &mut [u8]) -> Result<(), TaskError> {
        if space >= FIRST_SPACE {
            return Ok(self.object(space)?.read(addr, buf)?);
        }
        Ok(self.space(space)?.read(addr, buf)?)
    }

    fn write_runs(&mut self, space: u32, runs: &[(u64, &[u8])]) -> Result<(), TaskError> {
        if space >= FIRST_SPACE {
            return runs.iter().try_for_each(|(addr, data)| self.write(space, *addr, data));
        }
        Ok(self.space(space)?.write_runs(runs)?)
    }

    fn read_runs(&mut self, space: u32, runs: &mut [(u64, &mut [u8])]) -> Result<(), TaskError> {
        if space >= FIRST_SPACE {
            return runs.iter_mut().try_for_each(|(addr, buf)| self.read(space, *addr, buf));
        }
        Ok(self.space(space)?.read_runs(runs)?)
    }

    fn restore(&mut self, image: &[u8]) -> Result<(), TaskError> {
        let image: InstanceImage = postcard::from_bytes(image)?;
        image.require_sound()?;
        self.make_mounts()?;
        self.restore_terminals(&image)?;
        let parts = self.settle_tables(&image)?;
        self.finish_tree(&image)?;
        self.set_foreground_groups(&image)?;
        let arrival = self.arrival.as_ref().ok_or("nothing has been prepared")?;
        sysv::make_queues(arrival.stub_pid, &image.queues)
            .map_err(TraceeError::call("making SysV objects", arrival.stub_pid))?;
        image.names.give(arrival.stub_pid).map_err(TraceeError::call("naming the host", arrival.stub_pid))?;
        let set = TraceeError::call("setting the sysctls of its network", arrival.stub_pid);
        image.sysctls.give(arrival.stub_pid).map_err(set)?;
        let stubs: BTreeMap<i32, i32> =
            self.processes.iter().map(|process| (process.node.pid, process.space.pid())).collect();
        let link: &Link = &self.arrival.as_ref().ok_or("nothing has been prepared")?.link;
        let (objects, same_kernel) = (&self.objects, self.same_kernel);
        let mut restorer = Restorer::new(Surroundings {
            link,
            stubs: &stubs,
            objects,
            terminals: &self.terminals,
            same_kernel,
        });
        let mut remotes: BTreeMap<_, _> =
            self.processes.iter_mut().map(|process| (process.node.pid, process.space.remote())).collect();
        restorer.prepare(&image, &mut remotes)?;
        if image.processes.len() != self.processes.len() {
            return Err(refuse("the image has fewer processes than the layout".into()));
        }
        let mut spaces: BTreeMap<u32, &mut Space> =
            self.processes.iter_mut().map(|process| (process.number, &mut process.space)).collect();
        let jobs = image.processes.iter().zip(parts).enumerate().map(|(number, (described, parts))| {
            let space = spaces.remove(&described.space);
            let space = space.ok_or_else(|| format!("there is no process {}", described.space))?;
            Ok(Job { number, space, task: &described.task, parts })
        });
        let jobs = jobs.collect::<Result<Vec<_>, TaskError>>()?;
        let pid_of =
            |inner: i32| if inner == INIT { arrival.instance().init_pid } else { stubs.get(&inner).copied() };
        let finish = |restorer: Restorer<'_>| {
            objects.values().try_for_each(|object| object.finish(arrival.stub_pid))?;
            let cgroup = &arrival.instance().cgroup;
            image
                .cgroups
                .make(cgroup, pid_of)
                .map_err(TraceeError::call("making the cgroups", arrival.stub_pid))?;
            let finals = restorer.finish()?;
            cgroup::freeze(cgroup, true)?;
            Ok(finals)
        };
        self.parked = Some(side_by_side::rebuild(&image.processes, jobs, restorer, finish)?);
        Ok(())
    }

    fn activate(&mut self) -> Result<(), TaskError> {
        let arrival = self.arrival.as_mut().ok_or("nothing has been prepared")?;
        let parked = self.parked.as_mut().ok_or("nothing was restored")?;
        let began = Instant::now();
        volumes::keep(&arrival.volume_moves())?;
        arrival.attach()?;
        let attached = began.elapsed();
        parked.resume();
        cgroup::freeze(&arrival.instance().cgroup, false)?;
        tracing::debug!(?attached, released = ?began.elapsed(), "activated");
        let mut instance = arrival.instance().clone();
        instance.origin = Origin::Migrated;
        instance.since = UnixMillis::now();
        arrival.keep(&instance)?;
        self.reception.arrived(&instance);
        if let Some(parked) = self.parked.take() {
            parked.repeat_lost();
        }
        Ok(())
    }

    fn abandon(&mut self) -> Result<(), TaskError> {
        self.parked = None;
        self.processes.clear();
        self.objects.clear();
        self.terminals = Terminals::default();
        if let Some(arrival) = self.arrival.take() {
            arrival.forget()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::offer::tests::modest;

    #[test]
    fn clocks_go_on_under_a_kernel_that_was_started_at_another_time() {
        let ahead = Clocks { monotonic_ns: 1 << 50, boottime_ns: 1 << 51 };
        let mut requirements = modest();
        requirements.host.boot_id = "another".into();
        requirements.clocks = Clocks::of_this_kernel().expect("clocks").plus(ahead);
        let found = clock_offsets(&requirements).expect("clocks").expect("they differ");
        let late = ahead.minus(found);
        for ns in [late.monotonic_ns, late.boottime_ns] {
            assert!((0..1_000_000_000).contains(&ns), "{found:?} instead of {ahead:?}");
        }
        // Under one kernel they are told exactly.
        requirements.host.boot_id = HostTraits::here().expect("this host's traits").boot_id;
        assert_eq!(clock_offsets(&requirements).expect("clocks"), None);
        requirements.clock_offsets = ahead;
        assert_eq!(clock_offsets(&requirements).expect("clocks"), Some(ahead));
    }
}
