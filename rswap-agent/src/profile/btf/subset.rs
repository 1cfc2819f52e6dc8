//! Cuts a kernel's type information down to what rswap's programs ask of it, so that kernels that don't run here can be asked, too.
//!
//! The structures that are asked for keep all of their members, with names and offsets; the members' own types are left out unless something in
//! them is asked for, or they have no name.

use std::collections::{BTreeMap, HashMap};

use super::{
    KIND_ENUM, KIND_ENUM64, KIND_FUNC_PROTO, KIND_FWD, KIND_INT, KIND_PTR, KIND_STRUCT, KIND_TYPEDEF,
    KIND_UNION, KernelTypes, MAGIC, Type, string_at, u32_at,
};

/// The members that are asked for in a structure, and in those that they are.
#[derive(Default)]
struct Wanted(BTreeMap<String, Wanted>);

impl Wanted {
    fn add(&mut self, path: &str) {
        let (first, rest) = path.split_once('.').unwrap_or((path, ""));
        let inner = self.0.entry(first.to_owned()).or_default();
        if !rest.is_empty() {
            inner.add(rest);
        }
    }
}

struct Cut<'t> {
    from: &'t KernelTypes,
    types: Vec<Vec<u32>>,
    strings: Vec<u8>,
    known: HashMap<String, u32>,
}

/// What is left of `from` for these fields (structure, field), tracepoints and enumerations.
pub(super) fn subset(
    from: &KernelTypes,
    fields: &[(&str, &str)],
    tracepoints: &[&str],
    enumerations: &[&str],
) -> Vec<u8> {
    let mut wanted: BTreeMap<&str, Wanted> = BTreeMap::new();
    for (in_struct, field) in fields {
        wanted.entry(in_struct).or_default().add(field);
    }
    let mut cut = Cut { from, types: Vec::new(), strings: vec![0], known: HashMap::new() };
    for (in_struct, wanted) in &wanted {
        if let Some(id) = from.structs.get(*in_struct) {
            cut.structure(*id, wanted);
        }
    }
    for name in tracepoints {
        if let Some(id) = from.tracepoints.get(*name) {
            cut.tracepoint(*id);
        }
    }
    let all = (1..=from.types.len() as u32).filter_map(|id| from.type_of(id));
    for found in all.filter(|found| found.kind == KIND_ENUM) {
        if enumerations.contains(&cut.name(found.name).as_str()) {
            cut.enumeration(found);
        }
    }
    cut.bytes()
}

impl Cut<'_> {
    fn name(&self, at: u32) -> String {
        string_at(&self.from.bytes, self.from.strings, at).unwrap_or_default().to_owned()
    }

    fn string(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        if let Some(at) = self.known.get(text) {
            return *at;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(text.bytes().chain([0]));
        self.known.insert(text.to_owned(), at);
        at
    }

    fn add(&mut self, words: Vec<u32>) -> u32 {
        self.types.push(words);
        self.types.len() as u32
    }

    fn word(&self, at: usize) -> u32 {
        u32_at(&self.from.bytes, at).unwrap_or(0)
    }

    /// Its members are first: types may be in any order.
    fn structure(&mut self, id: u32, wanted: &Wanted) -> u32 {
        let Some(of) = self.from.without_qualifiers(id) else { return 0 };
        if of.kind != KIND_STRUCT && of.kind != KIND_UNION {
            return self.shallow(id);
        }
        let mut members = Vec::new();
        for index in 0..of.member_count {
            let at = of.data + index * 12;
            let name = self.name(self.word(at));
            let inner = match wanted.0.get(&name) {
                _ if name.is_empty() => self.structure(self.word(at + 4), wanted),
                Some(inner) if !inner.0.is_empty() => self.structure(self.word(at + 4), inner),
                _ => 0,
            };
            members.extend([self.string(&name), inner, self.word(at + 8)]);
        }
        let name = self.name(of.name);
        let head = [self.string(&name), info(of), of.size_or_type];
        self.add([head.as_slice(), &members].concat())
    }

    fn tracepoint(&mut self, id: u32) {
        let of = |id| self.from.type_of(id);
        let Some((typedef, pointer)) = of(id).and_then(|typedef| Some((typedef, of(typedef.size_or_type)?)))
        else {
            return;
        };
        let Some(prototype) = of(pointer.size_or_type).filter(|found| found.kind == KIND_FUNC_PROTO) else {
            return;
        };
        let mut arguments = Vec::new();
        for index in 0..prototype.member_count {
            let kept = self.shallow(self.word(prototype.data + index * 8 + 4));
            arguments.extend([0, kept]);
        }
        let prototype = self.add([&[0, info(prototype), 0][..], &arguments].concat());
        let pointer = self.add(vec![0, KIND_PTR << 24, prototype]);
        let name = self.name(typedef.name);
        let head = [self.string(&name), KIND_TYPEDEF << 24, pointer];
        self.add(head.into());
    }

    /// What it is called, and nothing of what it is made of.
    fn shallow(&mut self, id: u32) -> u32 {
        let Some(of) = self.from.type_of(id) else { return 0 };
        let name = self.name(of.name);
        let name = self.string(&name);
        match of.kind {
            KIND_PTR => {
                let inner = self.shallow(of.size_or_type);
                self.add(vec![0, KIND_PTR << 24, inner])
            }
            KIND_STRUCT | KIND_FWD => self.add(vec![name, KIND_FWD << 24, 0]),
            KIND_UNION => self.add(vec![name, KIND_UNION << 24, of.size_or_type]),
            KIND_ENUM | KIND_ENUM64 => self.add(vec![name, KIND_ENUM << 24, of.size_or_type]),
            KIND_INT => self.add(vec![name, KIND_INT << 24, of.size_or_type, self.word(of.data)]),
            KIND_TYPEDEF => self.add(vec![name, KIND_TYPEDEF << 24, 0]),
            _ => self.shallow(of.size_or_type),
        }
    }

    fn enumeration(&mut self, of: Type) {
        let name = self.name(of.name);
        let mut words = vec![self.string(&name), info(of), of.size_or_type];
        for index in 0..of.member_count {
            let member = self.name(self.word(of.data + index * 8));
            words.extend([self.string(&member), self.word(of.data + index * 8 + 4)]);
        }
        self.add(words);
    }

    fn bytes(self) -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        let types = words(&self.types.concat());
        let magic = MAGIC.to_ne_bytes();
        let first = u32::from_ne_bytes([magic[0], magic[1], 1, 0]);
        let (types_length, strings_length) = (types.len() as u32, self.strings.len() as u32);
        let head = words(&[first, 24, 0, types_length, types_length, strings_length]);
        [head, types, self.strings].concat()
    }
}

/// Kind, number of members, and whether they may be bits.
fn info(of: Type) -> u32 {
    of.kind << 24 | of.member_count as u32 | u32::from(of.kind_flag) << 31
}
