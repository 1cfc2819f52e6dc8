//! Finds the eBPF object that `cargo xtask build` made, for the agent to embed.

use std::{env, path::Path};

fn main() {
    println!("cargo:rustc-check-cfg=cfg(rswap_ebpf_object)");
    let manifest = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for every build script");
    let object = Path::new(&manifest).join("../target/ebpf/rswap-ebpf");
    // A path that is not there yet also makes cargo look again at the next build.
    println!("cargo:rerun-if-changed={}", object.display());
    if object.is_file() {
        println!("cargo:rustc-cfg=rswap_ebpf_object");
        println!("cargo:rustc-env=RSWAP_EBPF_OBJECT={}", object.display());
    } else {
        println!(
            "cargo:warning=built without eBPF programs: use `cargo xtask build` to have profiles from the kernel"
        );
    }
}
