//! Memory: its nodes, and the tiers that the kernel sorts them into.

use std::collections::BTreeMap;

use rswap_types::CpuSet;

use crate::{
    Known, LocalKind,
    root::{Root, numbered},
};

const NODES: &str = "/sys/devices/system/node";
const TIERS: &str = "/sys/devices/virtual/memory_tiering";

/// One node, or the machine where it has none.
pub(crate) struct Node {
    /// `None`: the kernel knows no nodes.
    pub(crate) node: Option<usize>,
    pub(crate) cpus: CpuSet,
    pub(crate) tier: Option<u32>,
    pub(crate) distances: Vec<u32>,
    pub(crate) bytes: Option<Known>,
    pub(crate) free_bytes: Option<Known>,
}

/// All nodes that have memory.
pub(crate) fn nodes(root: &Root<'_>) -> Vec<Node> {
    let tiers = tiers(root);
    let numbers = root.names(NODES).into_iter().filter_map(|name| numbered(&name, "node"));
    let mut found: Vec<Node> = numbers.filter_map(|node| one(root, node, &tiers)).collect();
    found.sort_by_key(|node| node.node);
    if found.is_empty() {
        found.extend(whole(root));
    }
    found
}

fn one(root: &Root<'_>, node: usize, tiers: &BTreeMap<usize, u32>) -> Option<Node> {
    let dir = format!("{NODES}/node{node}");
    let file = format!("{dir}/meminfo");
    let fields = fields(&root.text(&file).unwrap_or_default());
    let bytes = fields.get("MemTotal").copied();
    if bytes == Some(0) {
        return None;
    }
    let distances = root.text(&format!("{dir}/distance")).unwrap_or_default();
    Some(Node {
        node: Some(node),
        cpus: root.set(&format!("{dir}/cpulist")).unwrap_or_default(),
        tier: tiers.get(&node).copied(),
        distances: distances.split_ascii_whitespace().map_while(|text| text.parse().ok()).collect(),
        free_bytes: bytes
            .zip(free(&fields))
            .map(|(all, free)| Known::found(free.min(all) as f64, file.clone())),
        bytes: bytes.map(|bytes| Known::found(bytes as f64, file)),
    })
}

/// A kernel without nodes.
fn whole(root: &Root<'_>) -> Option<Node> {
    let file = "/proc/meminfo";
    let fields = fields(&root.text(file)?);
    let known = |key: &str| fields.get(key).map(|&bytes| Known::found(bytes as f64, file));
    Some(Node {
        node: None,
        cpus: root.set("/sys/devices/system/cpu/online").unwrap_or_default(),
        tier: None,
        distances: Vec::new(),
        bytes: Some(known("MemTotal")?),
        free_bytes: known("MemAvailable"),
    })
}

/// What a node could give: nothing says MemAvailable per node, so it is what is free, and what could be freed without
/// writing anything to swap.
fn free(fields: &BTreeMap<String, u64>) -> Option<u64> {
    let field = |key: &str| fields.get(key).copied().unwrap_or(0);
    let file_pages = field("FilePages").saturating_sub(field("Shmem"));
    Some(fields.get("MemFree")?.saturating_add(file_pages).saturating_add(field("SReclaimable")))
}

/// `Key: 5 kB`, with `Node 0 ` before it or not, in bytes. `procfs` reads /proc/meminfo alone: it asks for lines that a
/// node's file does not have.
pub(crate) fn fields(text: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (head, value) = line.split_once(':')?;
        let key = head.split_ascii_whitespace().next_back()?;
        let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some((key.to_owned(), kib.checked_mul(1024)?))
    };
    text.lines().filter_map(line).collect()
}

/// Node -> tier.
fn tiers(root: &Root<'_>) -> BTreeMap<usize, u32> {
    let mut tiers = BTreeMap::new();
    for name in root.names(TIERS) {
        let tier = numbered(&name, "memory_tier").and_then(|tier| u32::try_from(tier).ok());
        let nodes = root.set(&format!("{TIERS}/{name}/nodelist")).unwrap_or_default();
        tiers.extend(tier.into_iter().flat_map(|tier| nodes.iter().map(move |&node| (node, tier))));
    }
    tiers
}

/// Several nodes as one pool.
pub(crate) fn kind(nodes: &[&Node]) -> LocalKind {
    let tiers: std::collections::BTreeSet<_> = nodes.iter().map(|node| node.tier).collect();
    LocalKind::Memory {
        nodes: nodes.iter().filter_map(|node| node.node).collect(),
        cpus: nodes.iter().flat_map(|node| node.cpus.iter().copied()).collect(),
        tier: if tiers.len() == 1 { nodes.first().and_then(|node| node.tier) } else { None },
        distances: nodes.first().map(|node| node.distances.clone()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_a_node_and_the_machine() {
        let node =
            fields("Node 0 MemTotal:       4 kB\nNode 0 MemFree:  1 kB\nNode 0 HugePages_Total:     0\n");
        assert_eq!(node, BTreeMap::from([("MemTotal".to_owned(), 4096), ("MemFree".to_owned(), 1024)]));
        assert_eq!(fields("MemAvailable:  2 kB")["MemAvailable"], 2048);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in any::<String>()) {
            let _ = free(&fields(&text));
        }

        #[test]
        fn what_is_written_is_read(kib in 0u64..1 << 50, node in 0usize..1024) {
            let text = format!("Node {node} MemTotal: {kib:>12} kB");
            prop_assert_eq!(fields(&text).get("MemTotal").copied(), Some(kib * 1024));
        }
    }
}
