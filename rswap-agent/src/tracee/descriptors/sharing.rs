//! What processes share, and what they are connected to.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::RawFd,
};

use super::{
    super::{
        TraceeError,
        image::{Descriptor, DescriptorKind},
        unix::UnixState,
    },
    Around, Fifo, LockKind, Refused, outside,
};
use crate::sys::process;

/// Marks descriptors that are the same description as one of an earlier process. `processes`: the pid that the agent
/// sees, the pid inside, and the descriptors.
pub fn share(around: &Around, processes: &mut [(i32, i32, Vec<Descriptor>)]) -> Result<(), TraceeError> {
    /// Agent's pid, pid inside, number.
    type Holder = (i32, i32, RawFd);
    let mut known: BTreeMap<(String, i32), Vec<Holder>> = BTreeMap::new();
    let mut contents = BTreeSet::new();
    for (pid, inner, descriptors) in processes {
        for descriptor in descriptors {
            keep_contents_once(&mut descriptor.kind, &mut contents);
            let number = descriptor.numbers[0].0;
            // Only what looks alike can be the same, and comparing costs a system call.
            let (place, fd) = around.location(*pid, number);
            let path = format!("/proc/{place}/fd/{fd}");
            let target =
                fs::read_link(&path).map_err(TraceeError::proc(path))?.to_string_lossy().into_owned();
            let alike = known.entry((target, descriptor.flags)).or_default();
            let mut same = None;
            for &(other, other_inner, other_number) in alike.iter().filter(|(other, ..)| other != pid) {
                let (other, other_fd) = around.location(other, other_number);
                let compared = process::same_description_of(place, fd, other, other_fd);
                if compared.map_err(TraceeError::call("kcmp", *pid))? {
                    same = Some((other_inner, other_number));
                    break;
                }
            }
            match same {
                Some((pid, number)) => {
                    descriptor.kind = DescriptorKind::Shared { pid, number };
                    descriptor.signals = None;
                    // The others are the description's, and carried with it.
                    descriptor.locks.retain(|lock| lock.kind == LockKind::Process);
                }
                None => alike.push((*pid, *inner, number)),
            }
        }
    }
    Ok(())
}

/// Several descriptions may be of one pipe or file: what is in it is carried with the first.
fn keep_contents_once(kind: &mut DescriptorKind, seen: &mut BTreeSet<(u64, u64)>) {
    if let DescriptorKind::Master { number, terminal } = kind {
        // All masters of a pair are one description, or it was opened again through /proc.
        if !seen.insert((u64::MAX, u64::from(*number))) {
            *terminal = None;
        }
        return;
    }
    let (inode, contents) = match kind {
        DescriptorKind::Pipe { inode, queued, .. } => ((0, *inode), queued),
        DescriptorKind::Fifo(fifo) => ((0, fifo.inode), &mut fifo.queued),
        DescriptorKind::Nameless(file) => (file.inode, &mut file.contents),
        _ => return,
    };
    // A write end has nothing to tell.
    if !contents.is_empty() && !seen.insert(inode) {
        contents.clear();
    }
}

/// What is connected to something outside of the instance: (pid, descriptor). `processes`: pids that the agent sees, with
/// their descriptors; `frozen`, they are stopped, and what waits in queues is described as well.
pub fn connected_outside(processes: &[(i32, &[Descriptor])], frozen: bool) -> Vec<(i32, Refused)> {
    let mut pipes: BTreeMap<u64, (bool, bool)> = BTreeMap::new();
    let (mut sockets, mut waiting) = (BTreeSet::new(), BTreeSet::new());
    let pipe = |descriptor: &Descriptor| match &descriptor.kind {
        DescriptorKind::Pipe { inode, .. } | DescriptorKind::Fifo(Fifo { inode, .. }) => {
            Some((*inode, descriptor.flags & libc::O_ACCMODE))
        }
        _ => None,
    };
    let all =
        || processes.iter().flat_map(|(pid, list)| list.iter().map(move |descriptor| (*pid, descriptor)));
    for (_, descriptor) in all() {
        if let Some((inode, access)) = pipe(descriptor) {
            let (read, written) = pipes.entry(inode).or_default();
            *read |= access != libc::O_WRONLY;
            *written |= access != libc::O_RDONLY;
        }
        if let DescriptorKind::Unix(image) = &descriptor.kind {
            sockets.insert(image.inode);
            if let UnixState::Listening { waiting: all, .. } = &image.state {
                waiting.extend(all.iter().copied());
            }
        }
    }
    let masters: BTreeSet<u32> = all()
        .filter_map(|(_, descriptor)| match descriptor.kind {
            DescriptorKind::Master { number, .. } => Some(number),
            _ => None,
        })
        .collect();
    let suspect = |descriptor: &Descriptor| match &descriptor.kind {
        DescriptorKind::Pipe { inode, .. } if pipes[inode] != (true, true) => {
            Some(("a pipe", format!("pipe:[{inode}]")))
        }
        DescriptorKind::Fifo(fifo) => Some(("a FIFO", fifo.path.clone())),
        DescriptorKind::Unix(image) => match &image.state {
            UnixState::Connected { peer } if !sockets.contains(peer) => {
                Some(("a unix socket", format!("socket:[{peer}]")))
            }
            _ => None,
        },
        _ => None,
    };
    let targets: BTreeSet<String> =
        all().filter_map(|(_, one)| suspect(one).map(|(_, target)| target)).collect();
    let outside = outside::held(&targets, processes.first().map_or(0, |(pid, _)| *pid));
    let refused = all().filter_map(|(pid, descriptor)| {
        let what = match &descriptor.kind {
            DescriptorKind::Slave { number } if !masters.contains(number) => "a pseudo-terminal",
            DescriptorKind::Unix(image) => match &image.state {
                // In the freeze all are known, those too that wait in queues.
                UnixState::Connected { peer } if frozen && !sockets.contains(peer) => "a unix socket",
                UnixState::Waiting if !waiting.contains(&image.inode) => "a unix socket",
                UnixState::Listening { waiting, .. } if !waiting.iter().all(|one| sockets.contains(one)) => {
                    "a unix socket with a connection that waits to be accepted"
                }
                _ => suspect(descriptor).filter(|(_, target)| outside.contains(target))?.0,
            },
            // Nobody else has it: it is closed, or waits in a queue.
            _ => suspect(descriptor).filter(|(_, target)| outside.contains(target))?.0,
        };
        let refused = Refused {
            fd: descriptor.numbers[0].0,
            what: format!("{what} whose other end is outside the instance"),
            remedy: "start the instance with --detach, or with its input and output redirected to files",
        };
        Some((pid, refused))
    });
    refused.collect()
}
