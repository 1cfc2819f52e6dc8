//! Block devices: what they really are, and what they lie on.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::root::{Root, numbered};

const BLOCK: &str = "/sys/class/block";

/// What a block device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A disk, or what a virtual machine takes for one.
    Disk,
    /// A part of one.
    Partition,
    /// A file.
    Loop,
    /// Compressed memory.
    Zram,
    /// Memory.
    Ram,
    /// The device mapper: LVM, encryption and the like.
    Dm,
    /// Several disks as one.
    Md,
    /// A disk of another machine.
    Network,
}

/// One block device. What the kernel does not say is `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Device {
    /// As in /sys/class/block.
    pub name: String,
    /// What it is.
    pub what: DeviceKind,
    /// Major and minor number: `254:0`.
    pub number: Option<String>,
    /// Its size.
    pub bytes: Option<u64>,
    /// Whether seeks cost time (`queue/rotational`). Virtual machines often say so of what is none.
    pub rotational: Option<bool>,
    /// The model that it names itself by.
    pub model: Option<String>,
    /// The I/O scheduler in use.
    pub scheduler: Option<String>,
    /// Whether it can't be written.
    pub read_only: Option<bool>,
    /// The devices that it lies on: the disk of a partition, the members of an array.
    pub on: Vec<String>,
    /// Loop: the file.
    pub file: Option<String>,
    /// Device mapper: its name under /dev/mapper.
    pub mapper_name: Option<String>,
    /// Array: members that are missing (`md/degraded`).
    pub missing: Option<u64>,
}

/// All devices that have a size: unused loop devices have none.
pub(crate) fn devices(root: &Root<'_>) -> Vec<Device> {
    // First of all: an idle host has many without, and each file takes time.
    let has_size = |name: &String| root.number::<u64>(&format!("{BLOCK}/{name}/size")) != Some(0);
    root.names(BLOCK).into_iter().filter(has_size).map(|name| device(root, name)).collect()
}

fn device(root: &Root<'_>, name: String) -> Device {
    let dir = format!("{BLOCK}/{name}");
    let at = |file: &str| format!("{dir}/{file}");
    let what = kind(&name, root.has(&at("partition")));
    let disk = if what == DeviceKind::Partition { root.parent_name(&dir) } else { None };
    // A partition has no queue of its own.
    let queue = disk.as_ref().map_or_else(|| at("queue"), |disk| format!("{BLOCK}/{disk}/queue"));
    let on = disk.map_or_else(|| root.names(&at("slaves")), |disk| vec![disk]);
    Device {
        what,
        number: root.text(&at("dev")).filter(|text| !text.is_empty()),
        // In sectors of 512 bytes, whatever the device's own are.
        bytes: root.number::<u64>(&at("size")).map(|sectors| sectors.saturating_mul(512)),
        rotational: flag(root, &format!("{queue}/rotational")),
        model: root.text(&at("device/model")).filter(|text| !text.is_empty()),
        scheduler: root.text(&format!("{queue}/scheduler")).and_then(|text| chosen(&text)),
        read_only: flag(root, &at("ro")),
        on,
        file: root.text(&at("loop/backing_file")),
        mapper_name: root.text(&at("dm/name")),
        missing: root.number(&at("md/degraded")),
        name,
    }
}

fn flag(root: &Root<'_>, file: &str) -> Option<bool> {
    root.number::<u8>(file).map(|value| value != 0)
}

fn kind(name: &str, partition: bool) -> DeviceKind {
    let is = |prefix: &str| numbered(name, prefix).is_some();
    match () {
        () if partition => DeviceKind::Partition,
        () if is("loop") => DeviceKind::Loop,
        () if is("zram") => DeviceKind::Zram,
        () if is("ram") => DeviceKind::Ram,
        () if is("dm-") => DeviceKind::Dm,
        () if is("md") || name.starts_with("md_") => DeviceKind::Md,
        () if is("nbd") || is("rbd") || is("drbd") => DeviceKind::Network,
        () => DeviceKind::Disk,
    }
}

/// The one in brackets: `mq-deadline` of `none [mq-deadline] kyber`.
pub(crate) fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (chosen, _) = rest.split_once(']')?;
    Some(chosen.to_owned())
}

/// `name` and all that it lies on, nearest first.
pub(crate) fn stack(devices: &[Device], name: &str) -> Vec<String> {
    let mut stack = vec![name.to_owned()];
    let mut next = 0;
    while let Some(on) = stack.get(next).and_then(|name| devices.iter().find(|device| device.name == *name)) {
        for below in &on.on {
            if !stack.contains(below) {
                stack.push(below.clone());
            }
        }
        next += 1;
    }
    stack
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_say_what_a_device_is() {
        use DeviceKind::*;
        let named = [
            ("nvme0n1", Disk),
            ("vda", Disk),
            ("loop7", Loop),
            ("loopback", Disk),
            ("zram0", Zram),
            ("ram1", Ram),
            ("dm-3", Dm),
            ("md127", Md),
            ("nbd0", Network),
        ];
        for (name, what) in named {
            assert_eq!(kind(name, false), what, "{name}");
        }
        assert_eq!(kind("sda1", true), Partition);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in any::<String>()) {
            let _ = (chosen(&text), kind(&text, false));
        }

        #[test]
        fn the_one_in_brackets_is_chosen(before in "[a-z ]{0,9}", name in "[a-z-]{1,9}", after in "[a-z ]{0,9}") {
            let found = chosen(&format!("{before}[{name}]{after}"));
            prop_assert_eq!(found, Some(name));
        }
    }
}
