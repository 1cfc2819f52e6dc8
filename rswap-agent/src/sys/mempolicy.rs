//! On which NUMA nodes memory is allocated.

use std::io;

use rswap_types::CpuSet;

/// Nodes that a mask has room for: the kernel's limit on all architectures.
const NODES: usize = 1024;

/// What the calling thread allocates from here on comes from `nodes` alone (set_mempolicy(2), MPOL_BIND).
pub fn bind_to_nodes(nodes: &CpuSet) -> io::Result<()> {
    let mut mask = [0u64; NODES / 64];
    for &node in nodes {
        let word = mask.get_mut(node / 64).ok_or(io::ErrorKind::InvalidInput)?;
        *word |= 1 << (node % 64);
    }
    // The kernel takes the number of bits plus one.
    let bits = NODES as libc::c_ulong + 1;
    // SAFETY: needed since no crate here has a safe form. The kernel reads `NODES` bits at the pointer, which `mask` has, and writes
    // nothing; what is allocated afterwards is ordinary memory.
    let done = unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_BIND, mask.as_ptr(), bits) };
    super::check(done).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_not_there_is_refused() {
        // On a thread of its own: the policy stays with the thread.
        let bound = |nodes: CpuSet| std::thread::spawn(move || bind_to_nodes(&nodes)).join().unwrap();
        assert!(bound(CpuSet::from([NODES - 1])).is_err());
        assert_eq!(bound(CpuSet::from([NODES])).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        if std::path::Path::new("/sys/devices/system/node/node0").exists() {
            bound(CpuSet::from([0])).unwrap();
        }
    }
}
