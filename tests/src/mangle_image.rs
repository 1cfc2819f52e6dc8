//! Damage to an instance's image that leaves it an image: it can be decoded, and says what no source would say.

use std::collections::BTreeMap;

use anyhow::Context;
use fastrand::Rng;
use rswap_agent::tracee::image::{DescriptorKind, InstanceImage};
use serde_json::Value;

/// Tries before a seed is given up: most damage makes it no image any more.
const TRIES: u32 = 400;
/// Arrays of more numbers are contents: registers, queues. One of them is damaged as often as a single number is.
const CONTENTS: usize = 24;

/// Numbers that are near some edge.
const EDGES: [i128; 22] = [
    0,
    1,
    -1,
    2,
    63,
    64,
    65,
    255,
    4096,
    1 << 16,
    1 << 20,
    i32::MAX as i128,
    i32::MIN as i128,
    u32::MAX as i128,
    1 << 32,
    1 << 47,
    i64::MAX as i128,
    i64::MIN as i128,
    u64::MAX as i128,
    i64::MAX as i128 - 1,
    1_000_000_000,
    -1_000_000_000,
];

/// The image with one part damaged, as `seed` says, and what was done. The same seed does the same to the same image.
pub fn damaged(image: &InstanceImage, seed: u64) -> anyhow::Result<(InstanceImage, String)> {
    let mut image = image.clone();
    // A digest is longer than a number of JSON may be, and the destination refuses another one at once.
    let tables = image.processes.iter_mut().flat_map(|process| process.task.open_files_mut());
    for descriptor in tables.flat_map(|(_, descriptors)| descriptors) {
        if let DescriptorKind::File { digest, .. } = &mut descriptor.kind {
            *digest = None;
        }
    }
    let whole = serde_json::to_value(&image)?;
    let mut random = Rng::with_seed(seed);
    // By field, so that the few parts of a kind are damaged as often as the many of another one.
    let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
    walk(&whole, String::new(), String::new(), &mut fields);
    let names: Vec<&String> = fields.keys().collect();
    for _ in 0..TRIES {
        let name = names[random.usize(..names.len())];
        let places = &fields[name];
        let place = &places[random.usize(..places.len())];
        let mut changed = whole.clone();
        let Some(part) = changed.pointer_mut(place) else { continue };
        let before = short(part);
        let other = &places[random.usize(..places.len())];
        change(part, &mut random, whole.pointer(other));
        let after = short(part);
        if let Ok(found) = serde_json::from_value::<InstanceImage>(changed)
            && found != image
        {
            return Ok((found, format!("{place}: {before} became {after}")));
        }
    }
    None.with_context(|| format!("seed {seed} damages nothing"))
}

/// Notes where each field is; `field` is its place without numbers.
fn walk(value: &Value, place: String, field: String, fields: &mut BTreeMap<String, Vec<String>>) {
    match value {
        Value::Array(items) if items.len() <= CONTENTS || !items.iter().all(Value::is_number) => {
            for (at, item) in items.iter().enumerate() {
                walk(item, format!("{place}/{at}"), format!("{field}/*"), fields);
            }
        }
        Value::Object(parts) => {
            for (name, part) in parts {
                let name = name.replace('~', "~0").replace('/', "~1");
                walk(part, format!("{place}/{name}"), format!("{field}/{name}"), fields);
            }
        }
        _ => {}
    }
    fields.entry(field).or_default().push(place);
}

/// Changes a part; `other` is the same field of something else.
fn change(part: &mut Value, random: &mut Rng, other: Option<&Value>) {
    match part {
        Value::Number(number) => {
            let before = number.as_i128().unwrap_or(0);
            let to = match random.u32(..4) {
                0 => before ^ 1 << random.u32(..64),
                1 => before + i128::from(random.i8(..)),
                _ => EDGES[random.usize(..EDGES.len())],
            };
            *part = match (u64::try_from(to), i64::try_from(to)) {
                (Ok(to), _) => to.into(),
                (_, Ok(to)) => to.into(),
                _ => 0.into(),
            };
        }
        Value::String(text) => {
            let longer = "x".repeat(5000);
            let choice =
                ["", "/", "..", "../../etc/passwd", "/dev/null", "/proc/self/exe", "a\0b", longer.as_str()];
            *text = choice[random.usize(..choice.len())].to_owned();
        }
        Value::Bool(set) => *set = !*set,
        Value::Array(items) => match random.u32(..6) {
            0 => items.clear(),
            1 => items.truncate(random.usize(..items.len().max(1))),
            2 => items.reverse(),
            3 if !items.is_empty() => {
                let again = items[random.usize(..items.len())].clone();
                items.insert(random.usize(..items.len()), again);
            }
            4 if items.iter().all(Value::is_number) => {
                let first = items.first().cloned().unwrap_or(0.into());
                items.resize(random.usize(..100_000), first);
            }
            _ => {
                if let Some(at) = items.len().checked_sub(1).map(|last| random.usize(..=last)) {
                    change(&mut items[at], random, None);
                }
            }
        },
        _ => {}
    }
    if let Some(other) = other.filter(|_| random.u32(..5) == 0) {
        *part = other.clone();
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    let end = text.floor_char_boundary(60);
    if end < text.len() { format!("{}... ({} bytes)", &text[..end], text.len()) } else { text }
}
