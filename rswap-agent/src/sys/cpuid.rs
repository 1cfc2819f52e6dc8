//! What the processor tells programs that ask it themselves, whatever the kernel makes of it.
//! Source: Intel SDM volume 2A, CPUID, and volume 1, chapter 13 (XSAVE); AMD APM volume 3, appendix E.

use std::arch::x86_64::{__cpuid_count, __get_cpuid_max, _xgetbv};

use serde::{Deserialize, Serialize};

/// Features are bits of these registers; a mask leaves out what only a kernel can use. (leaf, subleaf, EAX, EBX, ECX, EDX)
const FEATURES: [(u32, u32, [u32; 4]); 5] = [
    (1, 0, [0, 0, !0, !0]),
    // Of EDX the instructions: the rest is about kernels' defences.
    (7, 0, [0, !0, !0, 0x03d1_413c]),
    (7, 1, [!0, 0, 0, !0]),
    (0xd, 1, [0x1f, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
];
const LEAF_XSAVE: u32 = 0xd;
/// CPUID.1:ECX, the kernel has enabled XSAVE.
const OSXSAVE: u32 = 1 << 27;

/// The features of a processor, and how it saves a thread's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// Leaf, subleaf, and the feature bits in EAX, EBX, ECX and EDX.
    pub features: Vec<(u32, u32, [u32; 4])>,
    /// Each state component that is enabled (XCR0): its number, size and offset in the XSAVE area, in bytes.
    pub components: Vec<(u32, u32, u32)>,
}

/// Whether the processor has registers that a program must ask for (AMX, CPUID.(7,0):EDX bit 24; `arch_prctl(2)`,
/// `ARCH_REQ_XCOMP_PERM`).
pub fn has_registers_on_demand() -> bool {
    const AMX_TILE: u32 = 1 << 24;
    exists(7) && ask(7, 0)[3] & AMX_TILE != 0
}

impl Processor {
    /// The one that this thread runs on.
    pub fn here() -> Self {
        let features = FEATURES.iter().filter(|(leaf, ..)| exists(*leaf)).map(|&(leaf, subleaf, mask)| {
            let [eax, ebx, ecx, edx] = ask(leaf, subleaf);
            (leaf, subleaf, [eax & mask[0], ebx & mask[1], ecx & mask[2], edx & mask[3]])
        });
        let enabled = enabled_components();
        let components = (0..63).filter(|number| enabled & (1 << number) != 0).map(|number| {
            // x87 and SSE have their fixed places; the leaf tells of the others.
            let [size, offset, ..] = if number < 2 { [0; 4] } else { ask(LEAF_XSAVE, number) };
            (number, size, offset)
        });
        Self { features: features.collect(), components: components.collect() }
    }

    /// What a program that has run on this processor may use, and finds missing or different on `other`.
    pub fn lacking_on(&self, other: &Self) -> Vec<String> {
        let mut lacking = Vec::new();
        for (leaf, subleaf, bits) in &self.features {
            let there = other.features.iter().find(|(l, s, _)| (l, s) == (leaf, subleaf));
            let there = there.map_or([0; 4], |(.., bits)| *bits);
            for ((bits, there), register) in bits.iter().zip(there).zip(["EAX", "EBX", "ECX", "EDX"]) {
                let missing = bits & !there;
                if missing != 0 {
                    lacking.push(format!("bits {missing:#x} of CPUID {leaf:#x}.{subleaf}:{register}"));
                }
            }
        }
        for component in self.components.iter().filter(|component| !other.components.contains(component)) {
            lacking.push(format!("component {} of the XSAVE area as it is at the source", component.0));
        }
        lacking
    }
}

fn ask(leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = __cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

fn exists(leaf: u32) -> bool {
    leaf <= __get_cpuid_max(leaf & 0x8000_0000).0
}

/// XCR0.
fn enabled_components() -> u64 {
    #[target_feature(enable = "xsave")]
    fn read() -> u64 {
        // SAFETY: register 0 exists wherever XSAVE is enabled, which the caller has made sure of.
        unsafe { _xgetbv(0) }
    }
    if ask(1, 0)[2] & OSXSAVE == 0 {
        return 0;
    }
    // SAFETY: the processor has XSAVE, and the kernel has enabled it: OSXSAVE says so.
    unsafe { read() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_tells_what_the_kernel_tells() {
        let here = Processor::here();
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").expect("readable");
        let has = |flag: &str| {
            cpuinfo
                .lines()
                .any(|line| line.starts_with("flags") && line.split_whitespace().any(|word| word == flag))
        };
        let bit = |leaf, register: usize, bit: u32| {
            here.features.iter().any(|(l, s, bits)| (*l, *s) == (leaf, 0) && bits[register] & (1 << bit) != 0)
        };
        // SSE4.2, AVX2 and the 64-bit mode.
        assert_eq!(bit(1, 2, 20), has("sse4_2"));
        assert_eq!(bit(7, 1, 5), has("avx2"));
        assert_eq!(bit(0x8000_0001, 3, 29), has("lm"));
        assert_eq!(here.components.iter().any(|(number, ..)| *number == 2), has("avx"), "AVX is component 2");
    }

    #[test]
    fn what_is_missing_or_lies_elsewhere_is_named() {
        let here = Processor::here();
        assert_eq!(here.lacking_on(&here), [""; 0]);
        let (mut more, mut moved) = (here.clone(), here.clone());
        more.features[0].2[2] |= 1 << 31;
        let lacking = more.lacking_on(&Processor { features: vec![(1, 0, [0; 4])], ..here.clone() });
        assert!(lacking.iter().any(|text| text.contains("CPUID 0x1.0:ECX")), "{lacking:?}");
        moved.components.push((62, 64, 4096));
        assert_eq!(moved.lacking_on(&here), ["component 62 of the XSAVE area as it is at the source"]);
        assert_eq!(here.lacking_on(&moved), [""; 0], "more is no harm");
    }
}
