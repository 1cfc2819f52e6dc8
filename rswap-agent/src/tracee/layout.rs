//! An address space's mappings, and how to turn one layout into another.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{TraceeError, objects::SharedObject, read_proc, tables::Tables, tree::Node};
use crate::sys::mem::{self, RemoteAddr};

/// How the kernel calls memory in huge pages that has no file.
const HUGE_PAGES: &str = "/anon_hugepage (deleted)";
/// SysV shared memory.
const SYSV: &str = "/SYSV";
/// Ids of SysV segments, which begin at 0, are told from inodes by this.
const FIRST_SEGMENT: u64 = 1 << 48;

/// One mapping, as `/proc/PID/maps` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// `PROT_*`.
    pub protection: i32,
    /// Changes are seen by others.
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Inode number, 0 without a file; of SysV shared memory [`segment_inode`].
    pub inode: u64,
    /// The file's path, `[heap]`, `[stack]`, `[vdso]` ..., or empty.
    pub name: String,
}

impl Mapping {
    /// Made and filled by the kernel: it is moved or left alone, never copied.
    pub fn is_kernels_own(&self) -> bool {
        matches!(self.name.as_str(), "[vdso]" | "[vsyscall]") || self.name.starts_with("[vvar")
    }

    /// Backed by a file, or by what the kernel treats as one: memory that is shared.
    pub fn is_file(&self) -> bool {
        self.inode != 0 && (self.shared || !self.is_huge())
    }

    /// Memory in huge pages that were set aside for it (`MAP_HUGETLB`).
    pub fn is_huge(&self) -> bool {
        self.name == HUGE_PAGES
    }

    /// SysV shared memory.
    pub fn is_sysv(&self) -> bool {
        self.shared && self.name.starts_with(SYSV)
    }

    /// Memory that is shared through the kernel alone: anonymous, memfd, SysV.
    pub fn is_shared_memory(&self) -> bool {
        let nameless = ["/dev/zero (deleted)", "/memfd:", SYSV, HUGE_PAGES]
            .iter()
            .any(|name| self.name.starts_with(name));
        self.shared && self.inode != 0 && nameless
    }

    /// What the kernel keeps behind it, and nobody can take from there; and what would help.
    pub fn obstacle(&self) -> Option<(&'static str, &'static str)> {
        match self.name.trim_end_matches(" (deleted)") {
            // A ring is memory to look at, and more than that to the kernel.
            "/[aio]" => Some((
                "requests by io_setup(2)",
                "what the kernel works on for it can't be taken: switch the program to threads",
            )),
            "/secretmem" => Some(("secret memory", "nobody but the program can read it: use another kind")),
            _ => None,
        }
    }

    /// A file without a name, whose contents have to go along: shared memory, or a file that was deleted.
    pub fn is_object(&self) -> bool {
        self.is_shared_memory() || self.is_file() && self.name.ends_with(" (deleted)")
    }

    /// A file's contents as they are: the destination's file serves as well.
    pub fn is_read_only_file(&self) -> bool {
        self.is_file() && self.protection & libc::PROT_WRITE == 0
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never true: the kernel has no empty mapping.
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// Whether a part of `other` in the same place would be this mapping's memory just as well: the same
    /// kind of backing, whatever the protection.
    fn continues(&self, other: &Self) -> bool {
        self.shared == other.shared
            && self.inode == other.inode
            && (!self.is_file()
                || (self.name == other.name
                    && self.offset.wrapping_sub(self.start) == other.offset.wrapping_sub(other.start)))
            && (self.name == "[stack]") == (other.name == "[stack]")
            && self.is_huge() == other.is_huge()
    }

    /// The part of it from `start` to `end`.
    fn part(&self, start: u64, end: u64) -> Self {
        let offset = if self.is_file() { self.offset + (start - self.start) } else { 0 };
        Self { start, end, offset, ..self.clone() }
    }
}

/// Stands for the inode of the SysV segment `id`.
pub fn segment_inode(id: i32) -> u64 {
    FIRST_SEGMENT + u64::from(id.unsigned_abs())
}

/// The mappings of one process, and what else belongs to its address space from the beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// In ascending order.
    pub mappings: Vec<Mapping>,
    /// Transparent huge pages are switched off for the process (`PR_SET_THP_DISABLE`).
    pub huge_pages_off: bool,
}

/// The address spaces of an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceLayout {
    /// Its living processes, parents before their children.
    pub processes: Vec<ProcessLayout>,
    /// The memory that they share.
    pub objects: Vec<SharedObject>,
    /// Digest of each file that is mapped, by path: the destination's must be the same.
    pub files: BTreeMap<String, u128>,
}

/// The address space of one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLayout {
    /// Its number.
    pub space: u32,
    /// Whose it is.
    pub node: Node,
    /// The kernel's own mappings, to be laid out alike.
    pub kernel_mappings: Vec<Mapping>,
    /// All others.
    pub layout: Layout,
    /// The pseudo-terminal that controls it, by number, if it leads a session.
    pub terminal: Option<u32>,
    /// Whose tables it has.
    pub tables: Tables,
}

/// One step from a layout to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Unmap these bytes.
    Unmap {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// Map this.
    Map(Mapping),
    /// Change the protection.
    Protect {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// `PROT_*`.
        protection: i32,
    },
}

/// The steps that turn mappings `old` into `new`; what stays the same keeps its contents.
pub fn changes(old: &[Mapping], new: &[Mapping]) -> Vec<Change> {
    let mut cuts: Vec<u64> = old.iter().chain(new).flat_map(|m| [m.start, m.end]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut steps = Vec::new();
    for pair in cuts.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        match (covering(old, start), covering(new, start)) {
            (Some(_), None) => steps.push(Change::Unmap { start, end }),
            (None, Some(new)) => steps.push(Change::Map(new.part(start, end))),
            (Some(old), Some(new)) if !old.continues(new) => {
                steps.push(Change::Unmap { start, end });
                steps.push(Change::Map(new.part(start, end)));
            }
            (Some(old), Some(new)) if old.protection != new.protection => {
                steps.push(Change::Protect { start, end, protection: new.protection });
            }
            _ => {}
        }
    }
    steps
}

fn covering(mappings: &[Mapping], address: u64) -> Option<&Mapping> {
    let after = mappings.partition_point(|mapping| mapping.end <= address);
    mappings.get(after).filter(|mapping| mapping.start <= address)
}

/// The mappings of process `pid`.
pub fn read_mappings(pid: i32) -> Result<Vec<Mapping>, TraceeError> {
    let path = format!("/proc/{pid}/maps");
    parse(&read_proc(&path)?).ok_or_else(|| TraceeError::Proc { path, problem: "unexpected format".into() })
}

/// Digest of this process's vDSO: the kernel maps the same one into every program.
pub fn vdso_digest() -> std::io::Result<u128> {
    let pid = std::process::id() as i32;
    let mappings = read_mappings(pid).map_err(std::io::Error::other)?;
    let vdso = mappings.iter().find(|mapping| mapping.name == "[vdso]");
    let vdso = vdso.ok_or_else(|| std::io::Error::other("this process has no vDSO"))?;
    let mut code = vec![0; vdso.len() as usize];
    mem::read_exact(pid, RemoteAddr(vdso.start), &mut code)?;
    Ok(xxhash_rust::xxh3::xxh3_128(&code))
}

fn parse(text: &str) -> Option<Vec<Mapping>> {
    let mut mappings = text.lines().map(parse_line).collect::<Option<Vec<_>>>()?;
    name_grown_stack(&mut mappings);
    Some(mappings)
}

/// Gives what the stack has grown by its name. Where writes begin to be tracked in the upper part of a stack that grows just
/// then, the kernel has two mappings for it until the lower part is tracked as well, and calls only the upper one by its name.
/// Nothing else ends where a stack begins, as the kernel keeps a gap below it.
fn name_grown_stack(mappings: &mut [Mapping]) {
    for at in (1..mappings.len()).rev() {
        let (below, above) = mappings.split_at_mut(at);
        let (Some(lower), Some(upper)) = (below.last_mut(), above.first()) else { continue };
        let is_plain = !lower.shared && lower.inode == 0 && lower.name.is_empty();
        if upper.name == "[stack]"
            && is_plain
            && (lower.end, lower.protection) == (upper.start, upper.protection)
        {
            lower.name.clone_from(&upper.name);
        }
    }
}

/// One line of `/proc/PID/maps`.
pub(super) fn parse_line(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let (word, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = tail;
        Some(word).filter(|word| !word.is_empty())
    };
    let (start, end) = field()?.split_once('-')?;
    let permissions = field()?.as_bytes().to_vec();
    let offset = field()?;
    let _device = field()?;
    let inode = field()?;
    // The kernel writes a newline in a path as \012; everything else is as it is.
    let name = rest.trim_start().replace("\\012", "\n");
    let bit = |at: usize, letter: u8, value: i32| {
        if permissions.get(at) == Some(&letter) { value } else { 0 }
    };
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        protection: bit(0, b'r', libc::PROT_READ)
            | bit(1, b'w', libc::PROT_WRITE)
            | bit(2, b'x', libc::PROT_EXEC),
        shared: permissions.get(3) == Some(&b's'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        inode: if name.starts_with(SYSV) {
            segment_inode(inode.parse().ok()?)
        } else {
            inode.parse().ok()?
        },
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn anonymous(start: u64, end: u64, protection: i32) -> Mapping {
        Mapping { start, end, protection, shared: false, offset: 0, inode: 0, name: String::new() }
    }

    #[test]
    fn a_stack_in_two_mappings_is_a_stack() {
        let text = "7ffc60000000-7ffc60001000 rw-p 00000000 00:00 0 \n\
                    7ffc607d7000-7ffc607e0000 rw-p 00000000 00:00 0 \n\
                    7ffc607e0000-7ffc6084a000 rw-p 00000000 00:00 0 \n\
                    7ffc6084a000-7ffc60b25000 rw-p 00000000 00:00 0                          [stack]\n\
                    7ffc60b25000-7ffc60b27000 r--p 00000000 00:00 0                          [vvar]\n";
        let whole = parse(text).expect("mappings");
        let names: Vec<&str> = whole.iter().map(|mapping| mapping.name.as_str()).collect();
        assert_eq!(names, ["", "[stack]", "[stack]", "[stack]", "[vvar]"]);
        // Once it is one mapping, nothing of it is made anew at the destination.
        let merged = "7ffc60000000-7ffc60001000 rw-p 00000000 00:00 0 \n\
                      7ffc607d7000-7ffc60b25000 rw-p 00000000 00:00 0                          [stack]\n\
                      7ffc60b25000-7ffc60b27000 r--p 00000000 00:00 0                          [vvar]\n";
        assert_eq!(changes(&whole, &parse(merged).expect("mappings")), []);
        let guard = text.replace("7ffc607e0000-7ffc6084a000 rw-p", "7ffc607e0000-7ffc6084a000 ---p");
        assert_eq!(parse(&guard).expect("mappings")[2].name, "", "a mapping of its own");
    }

    #[test]
    fn a_grown_heap_keeps_its_contents() {
        let steps = changes(&[anonymous(0x1000, 0x3000, 3)], &[anonymous(0x1000, 0x5000, 3)]);
        assert_eq!(steps, [Change::Map(anonymous(0x3000, 0x5000, 3))]);
    }

    #[test]
    fn a_changed_protection_keeps_the_contents() {
        let steps = changes(
            &[anonymous(0x1000, 0x3000, 3)],
            &[anonymous(0x1000, 0x2000, 1), anonymous(0x2000, 0x3000, 3)],
        );
        assert_eq!(steps, [Change::Protect { start: 0x1000, end: 0x2000, protection: 1 }]);
    }

    #[test]
    fn another_file_in_the_same_place_is_mapped_anew() {
        let file = |inode| Mapping { inode, name: "/lib/x".into(), ..anonymous(0x1000, 0x2000, 1) };
        let steps = changes(&[file(7)], &[file(8)]);
        assert_eq!(steps, [Change::Unmap { start: 0x1000, end: 0x2000 }, Change::Map(file(8))]);
    }

    #[test]
    fn a_line_of_maps_is_understood() {
        let line = "7f1c2a000000-7f1c2a021000 r-xp 00003000 fe:00 1234                       /usr/lib/a b.so";
        let mapping = parse_line(line).expect("a valid line");
        assert_eq!(mapping.name, "/usr/lib/a b.so");
        assert_eq!(mapping.protection, libc::PROT_READ | libc::PROT_EXEC);
        assert_eq!((mapping.offset, mapping.inode, mapping.shared), (0x3000, 1234, false));
    }

    #[test]
    fn what_has_no_name_goes_along() {
        let named =
            |shared, name: &str| Mapping { shared, inode: 7, name: name.into(), ..anonymous(0, 0x1000, 3) };
        assert!(
            named(true, "/memfd:x (deleted)").is_object() && named(false, "/memfd:x (deleted)").is_object()
        );
        assert!(named(false, "/usr/lib/old.so (deleted)").is_object());
        assert!(!named(false, "/usr/lib/new.so").is_object());
        let huge = named(false, HUGE_PAGES);
        assert!(huge.is_huge() && !huge.is_file() && !huge.is_object());
        let shared = named(true, HUGE_PAGES);
        assert!(shared.is_huge() && shared.is_file() && shared.is_shared_memory());
    }

    #[test]
    fn this_process_can_be_read() {
        let mappings = read_mappings(std::process::id() as i32).expect("own mappings");
        assert!(mappings.iter().any(|mapping| mapping.name == "[vdso]"));
    }

    fn layouts() -> impl Strategy<Value = Vec<Mapping>> {
        prop::collection::vec((0_u64..32, 1_u64..6, 0_i32..4, 0_u64..3), 0..10).prop_map(|parts| {
            let mut at = 0;
            parts
                .into_iter()
                .map(|(gap, pages, protection, inode)| {
                    let start = at + gap;
                    at = start + pages;
                    Mapping { inode, ..anonymous(start << 12, at << 12, protection) }
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn the_steps_lead_to_the_new_layout(old in layouts(), new in layouts()) {
            // Page by page: what the steps leave must be what the new layout says.
            let page = |mappings: &[Mapping], at: u64| {
                covering(mappings, at).map(|m| (m.protection, m.inode, m.offset.wrapping_sub(m.start)))
            };
            let mut state: std::collections::BTreeMap<u64, (i32, u64, u64)> =
                (0..2048).filter_map(|n| page(&old, n << 12).map(|p| (n << 12, p))).collect();
            for step in changes(&old, &new) {
                match step {
                    Change::Unmap { start, end } => state.retain(|at, _| !(start..end).contains(at)),
                    Change::Map(m) => for at in (m.start..m.end).step_by(4096) {
                        prop_assert!(!state.contains_key(&at));
                        state.insert(at, (m.protection, m.inode, m.offset.wrapping_sub(m.start)));
                    },
                    Change::Protect { start, end, protection } => for (_, p) in state.range_mut(start..end) {
                        p.0 = protection;
                    },
                }
            }
            for n in 0..2048_u64 {
                let (got, wanted) = (state.get(&(n << 12)), page(&new, n << 12));
                prop_assert_eq!(got.map(|p| (p.0, p.1)), wanted.map(|p| (p.0, p.1)));
                if wanted.is_some_and(|p| p.1 != 0) {
                    prop_assert_eq!(got.copied(), wanted);
                }
            }
        }
    }
}
