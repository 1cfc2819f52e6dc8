//! How large the processor's xsave area is (Intel SDM volume 1, chapter 13; AMD APM volume 2, chapter 11).

use std::arch::x86_64::__cpuid_count;

/// The leaf of CPUID that tells of it.
const LEAF: u32 = 0xd;
/// x87 and SSE, then the header, are in every area.
const LEAST_BYTES: usize = 576;
/// A component that a thread has only after it asked for it (XFD): AMX's tiles.
const ON_DEMAND: u32 = 1 << 2;

/// The bytes of an area, not compacted, with all those of `features` that a thread has without asking for them, and the set of
/// the others.
pub fn usual_size(features: u64) -> (usize, u64) {
    let (mut bytes, mut on_demand) = (LEAST_BYTES, 0);
    for number in (2..63).filter(|number| features >> number & 1 == 1) {
        let component = cpuid(number);
        if component.ecx & ON_DEMAND != 0 {
            on_demand |= 1 << number;
        } else {
            bytes = bytes.max((component.ebx + component.eax) as usize);
        }
    }
    (bytes, on_demand)
}

#[expect(
    clippy::allow_attributes,
    reason = "whether this intrinsic is unsafe depends on the compiler's version"
)]
fn cpuid(component: u32) -> std::arch::x86_64::CpuidResult {
    #[allow(unused_unsafe, reason = "safe in newer compilers")]
    // SAFETY: the instruction touches nothing but registers, and every x86-64 processor has it.
    unsafe {
        __cpuid_count(LEAF, component)
    }
}
