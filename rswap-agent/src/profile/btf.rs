//! A small reader of the kernel's own type information (BTF): where a field lies in a structure, and what
//! a tracepoint's arguments are. eBPF programs built in Rust carry no relocations of their own, so the
//! agent looks both up in the running kernel and hands them to the programs before it loads them.

#[cfg(test)]
mod kernels;
#[cfg(test)]
mod subset;

use std::collections::HashMap;

/// Where the kernel shows its type information.
pub(super) const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const TYPE_BYTES: usize = 12;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FWD: u32 = 7;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// Most types followed through aliases, or structures nested: foreign bytes may hold a circle.
const MAX_DEPTH: u32 = 32;

/// Most members looked at for one field: circles may also branch.
const MAX_MEMBERS: u32 = 100_000;

/// Why type information could not be read, or did not hold what was looked up.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BtfError {
    /// The bytes are not BTF that this reader understands.
    #[error("the kernel's type information is malformed at byte {at}: {what}")]
    Malformed {
        /// Offset in the bytes.
        at: usize,
        /// What is wrong there.
        what: &'static str,
    },
    /// The kernel has no such structure.
    #[error("this kernel has no struct {0}")]
    NoStruct(String),
    /// The structure has no such field.
    #[error("this kernel's struct {in_struct} has no field {field}")]
    NoField {
        /// The structure.
        in_struct: String,
        /// The field.
        field: String,
    },
    /// The kernel has no such tracepoint.
    #[error("this kernel has no tracepoint {0}")]
    NoTracepoint(String),
}

/// Parsed type information.
#[derive(Debug)]
pub struct KernelTypes {
    bytes: Vec<u8>,
    strings: (usize, usize),
    /// Byte offset of each type's description, by type id less one.
    types: Vec<u32>,
    structs: HashMap<String, u32>,
    tracepoints: HashMap<String, u32>,
}

/// One type's description.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    member_count: usize,
    /// The structure's members carry bit-field widths in their offsets.
    kind_flag: bool,
    /// Size, or the id of the type referred to.
    size_or_type: u32,
    /// Where the kind's own data begins.
    data: usize,
}

impl KernelTypes {
    /// Reads the running kernel's.
    pub fn of_this_kernel() -> Result<Self, super::ProfileError> {
        let bytes = std::fs::read(KERNEL_BTF)
            .map_err(|source| super::ProfileError::Read { path: KERNEL_BTF.into(), source })?;
        Ok(Self::parse(bytes)?)
    }

    /// Reads `bytes`, in this machine's byte order.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        let malformed = |at, what| BtfError::Malformed { at, what };
        if u16_at(&bytes, 0) != Some(MAGIC) {
            return Err(malformed(0, "not BTF in this machine's byte order"));
        }
        let word = |at| u32_at(&bytes, at).map(|word| word as usize).ok_or(malformed(at, "header cut off"));
        let (header, type_offset, type_bytes) = (word(4)?, word(8)?, word(12)?);
        let (string_offset, string_bytes) = (word(16)?, word(20)?);
        let range = |offset: usize, length: usize| {
            let start = header.checked_add(offset)?;
            let end = start.checked_add(length)?;
            (end <= bytes.len()).then_some((start, end))
        };
        let types_range = range(type_offset, type_bytes).ok_or(malformed(8, "types outside of the data"))?;
        let strings =
            range(string_offset, string_bytes).ok_or(malformed(16, "strings outside of the data"))?;

        let mut this =
            Self { bytes, strings, types: Vec::new(), structs: HashMap::new(), tracepoints: HashMap::new() };
        let mut at = types_range.0;
        while at < types_range.1 {
            let described = this.type_at(at).ok_or(malformed(at, "type cut off"))?;
            let extra = described.extra_bytes().ok_or(malformed(at, "unknown kind of type"))?;
            this.types.push(at as u32);
            this.index(described);
            at = described.data + extra;
        }
        if at != types_range.1 {
            return Err(malformed(at, "type cut off"));
        }
        Ok(this)
    }

    fn index(&mut self, described: Type) {
        let id = self.types.len() as u32;
        let by_name = match described.kind {
            KIND_STRUCT => &mut self.structs,
            KIND_TYPEDEF => &mut self.tracepoints,
            _ => return,
        };
        let Some(name) = string_at(&self.bytes, self.strings, described.name) else { return };
        let name = match described.kind {
            KIND_TYPEDEF => name.strip_prefix("btf_trace_"),
            _ => Some(name),
        };
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            by_name.entry(name.to_owned()).or_insert(id);
        }
    }

    /// Whether the kernel itself (not a module) has the structure.
    pub fn has_struct(&self, name: &str) -> bool {
        self.structs.contains_key(name)
    }

    /// The offset, in bytes, of a field such as `sched_info.last_queued` in `struct task_struct`. Anonymous
    /// structures and unions on the way are looked into.
    pub fn field_offset(&self, in_struct: &str, field: &str) -> Result<u64, BtfError> {
        let mut id = *self.structs.get(in_struct).ok_or_else(|| BtfError::NoStruct(in_struct.to_owned()))?;
        let mut offset_bits = 0;
        let mut budget = MAX_MEMBERS;
        for name in field.split('.') {
            let (bits, member) = self.member(id, name, 0, &mut budget).ok_or_else(|| BtfError::NoField {
                in_struct: in_struct.to_owned(),
                field: field.to_owned(),
            })?;
            offset_bits += u64::from(bits);
            id = member;
        }
        Ok(offset_bits / 8)
    }

    /// Where a field of one bit lies in a structure itself: the byte, and the mask in it.
    pub fn bit(&self, in_struct: &str, field: &str) -> Result<(u64, u8), BtfError> {
        let id = *self.structs.get(in_struct).ok_or_else(|| BtfError::NoStruct(in_struct.to_owned()))?;
        let missing = || BtfError::NoField { in_struct: in_struct.to_owned(), field: field.to_owned() };
        let outer = self.without_qualifiers(id).filter(|outer| outer.kind_flag).ok_or_else(missing)?;
        let bits = (0..outer.member_count).find_map(|index| {
            let at = outer.data + index * 12;
            let name = string_at(&self.bytes, self.strings, u32_at(&self.bytes, at)?)?;
            let place = u32_at(&self.bytes, at + 8)?;
            (name == field && place >> 24 == 1).then_some(place & 0xff_ffff)
        });
        bits.map(|bits| (u64::from(bits / 8), 1 << (bits % 8))).ok_or_else(missing)
    }

    /// The number that `enum in_enum` gives `name`, unless it is negative.
    pub fn enumerator(&self, in_enum: &str, name: &str) -> Option<u32> {
        let named = |described: &Type, wanted: &str| {
            string_at(&self.bytes, self.strings, described.name) == Some(wanted)
        };
        let all = self.types.iter().filter_map(|at| self.type_at(*at as usize));
        all.filter(|described| described.kind == KIND_ENUM && named(described, in_enum)).find_map(|found| {
            let member = |index: usize| found.data + index * 8;
            let index = (0..found.member_count).find(|index| {
                let text = u32_at(&self.bytes, member(*index));
                text.and_then(|text| string_at(&self.bytes, self.strings, text)) == Some(name)
            })?;
            u32_at(&self.bytes, member(index) + 4).filter(|number| *number <= i32::MAX as u32)
        })
    }

    /// The arguments of a tracepoint as C types, without the first that is for the tracer.
    pub fn tracepoint_arguments(&self, tracepoint: &str) -> Result<Vec<String>, BtfError> {
        let missing = || BtfError::NoTracepoint(tracepoint.to_owned());
        let id = *self.tracepoints.get(tracepoint).ok_or_else(missing)?;
        let pointer = self.type_of(id).and_then(|typedef| self.type_of(typedef.size_or_type));
        let prototype = pointer.and_then(|pointer| self.type_of(pointer.size_or_type)).ok_or_else(missing)?;
        if prototype.kind != KIND_FUNC_PROTO {
            return Err(missing());
        }
        let arguments = (1..prototype.member_count).map(|index| {
            let id = u32_at(&self.bytes, prototype.data + index * 8 + 4).unwrap_or(0);
            self.c_name(id, 0)
        });
        Ok(arguments.collect())
    }

    /// The offset in bits and the type of a member, looked for in anonymous members too.
    fn member(&self, id: u32, name: &str, depth: u32, budget: &mut u32) -> Option<(u32, u32)> {
        if depth > MAX_DEPTH {
            return None;
        }
        let outer = self.without_qualifiers(id)?;
        if outer.kind != KIND_STRUCT && outer.kind != KIND_UNION {
            return None;
        }
        for index in 0..outer.member_count {
            *budget = budget.checked_sub(1)?;
            let at = outer.data + index * 12;
            let member_name = string_at(&self.bytes, self.strings, u32_at(&self.bytes, at)?)?;
            let member_type = u32_at(&self.bytes, at + 4)?;
            let mut bits = u32_at(&self.bytes, at + 8)?;
            if outer.kind_flag {
                if bits >> 24 != 0 && member_name == name {
                    return None; // a bit-field has no address
                }
                bits &= 0xff_ffff;
            }
            if member_name == name {
                return Some((bits, member_type));
            }
            if member_name.is_empty()
                && let Some((inner_bits, inner_type)) = self.member(member_type, name, depth + 1, budget)
            {
                return Some((bits.checked_add(inner_bits)?, inner_type));
            }
        }
        None
    }

    fn without_qualifiers(&self, id: u32) -> Option<Type> {
        let mut described = self.type_of(id)?;
        for _ in 0..MAX_DEPTH {
            match described.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    described = self.type_of(described.size_or_type)?;
                }
                _ => return Some(described),
            }
        }
        None
    }

    fn c_name(&self, id: u32, depth: u32) -> String {
        if depth > MAX_DEPTH {
            return "?".to_owned();
        }
        let Some(described) = self.type_of(id) else { return "void".to_owned() };
        let name = string_at(&self.bytes, self.strings, described.name).unwrap_or("?");
        match described.kind {
            KIND_PTR => format!("{} *", self.c_name(described.size_or_type, depth + 1)),
            KIND_STRUCT | KIND_FWD => format!("struct {name}"),
            KIND_UNION => format!("union {name}"),
            KIND_ENUM | KIND_ENUM64 => format!("enum {name}"),
            KIND_CONST | KIND_VOLATILE | KIND_RESTRICT | KIND_TYPE_TAG => {
                self.c_name(described.size_or_type, depth + 1)
            }
            _ => name.to_owned(),
        }
    }

    fn type_of(&self, id: u32) -> Option<Type> {
        let at = *self.types.get((id as usize).checked_sub(1)?)?;
        self.type_at(at as usize)
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        let info = u32_at(&self.bytes, at.checked_add(4)?)?;
        Some(Type {
            name: u32_at(&self.bytes, at)?,
            kind: (info >> 24) & 0x1f,
            member_count: (info & 0xffff) as usize,
            kind_flag: info >> 31 == 1,
            size_or_type: u32_at(&self.bytes, at + 8)?,
            data: at + TYPE_BYTES,
        })
    }
}

impl Type {
    /// Length of the kind's own data; `None` for a kind that is not known, whose length is not either.
    fn extra_bytes(self) -> Option<usize> {
        Some(match self.kind {
            KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
            KIND_ARRAY => 12,
            KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => self.member_count * 12,
            KIND_ENUM | KIND_FUNC_PROTO => self.member_count * 8,
            KIND_PTR | KIND_FWD | KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_FUNC
            | KIND_FLOAT | KIND_TYPE_TAG => 0,
            _ => return None,
        })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let word = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(word.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

fn string_at(bytes: &[u8], strings: (usize, usize), offset: u32) -> Option<&str> {
    let start = strings.0.checked_add(offset as usize)?;
    let rest = bytes.get(start..strings.1)?;
    std::str::from_utf8(&rest[..rest.iter().position(|&byte| byte == 0)?]).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn look_around(types: &KernelTypes) {
        for in_struct in types.structs.keys() {
            let _ = types.field_offset(in_struct, "a.b");
            let _ = types.field_offset(in_struct, "");
            let _ = types.enumerator(in_struct, "a");
            let _ = types.bit(in_struct, "a");
        }
        for tracepoint in types.tracepoints.keys() {
            let _ = types.tracepoint_arguments(tracepoint);
        }
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// `struct s { int a; struct { int b; }; }`
    fn small() -> Vec<u8> {
        let strings = b"\0s\0a\0b\0int\0";
        let types = words(
            &[
                &[7, KIND_INT << 24, 4, 32][..],                   // 1: int
                &[0, KIND_STRUCT << 24 | 1, 4, 5, 1, 0],           // 2: struct { int b; }
                &[1, KIND_STRUCT << 24 | 2, 8, 3, 1, 0, 0, 2, 32], // 3: struct s
            ]
            .concat(),
        );
        let mut bytes = words(&[
            u32::from_ne_bytes([MAGIC.to_ne_bytes()[0], MAGIC.to_ne_bytes()[1], 1, 0]),
            24,
            0,
            types.len() as u32,
            types.len() as u32,
            strings.len() as u32,
        ]);
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn finds_fields_in_anonymous_members() {
        let types = KernelTypes::parse(small()).unwrap();
        assert_eq!(types.field_offset("s", "a"), Ok(0));
        assert_eq!(types.field_offset("s", "b"), Ok(4));
        assert!(matches!(types.field_offset("s", "c"), Err(BtfError::NoField { .. })));
        assert_eq!(types.field_offset("t", "a"), Err(BtfError::NoStruct("t".into())));
    }

    #[test]
    fn reads_this_kernels_types_where_it_shows_them() {
        let Ok(bytes) = std::fs::read(KERNEL_BTF) else {
            eprintln!("not tested: {KERNEL_BTF} is not there");
            return;
        };
        let types = KernelTypes::parse(bytes).unwrap();
        assert!(types.field_offset("task_struct", "sched_info.last_queued").unwrap() > 0);
        assert_eq!(types.tracepoint_arguments("sched_switch").unwrap()[1], "struct task_struct *");
        assert_eq!(types.enumerator("pageflags", "PG_locked"), Some(0));
        assert!(types.enumerator("pageflags", "PG_head").is_some());
        // Neither is a field of one bit.
        assert!(types.bit("task_struct", "pid").is_err() && types.bit("task_struct", "in_no_wait").is_err());
        assert!(
            types.bit("task_struct", "in_iowait").is_ok()
                && types.field_offset("task_struct", "in_iowait").is_err()
        );
        assert_eq!(types.enumerator("pageflags", "PG_none_of_these"), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            if let Ok(types) = KernelTypes::parse(bytes) {
                look_around(&types);
            }
        }

        #[test]
        fn damaged_type_information_never_panics(damage in prop::collection::vec((0..1000usize, any::<u8>()), 1..8)) {
            let mut bytes = small();
            for (at, byte) in damage {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            if let Ok(types) = KernelTypes::parse(bytes) {
                look_around(&types);
            }
        }
    }
}
