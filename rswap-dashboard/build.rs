//! Lists the page's files, with the libraries that `cargo xtask build` fetched for it, to be embedded.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    println!("cargo:rustc-check-cfg=cfg(rswap_dashboard_libraries)");
    let variable = |name| env::var(name).map(PathBuf::from).map_err(io::Error::other);
    let manifest = variable("CARGO_MANIFEST_DIR")?;
    let (page, libraries) = (manifest.join("page"), manifest.join("../target/dashboard"));
    let mut files = list(&page)?;
    println!("cargo:rerun-if-changed={}", page.display());
    // A path that is not there yet also makes cargo look again at the next build.
    println!("cargo:rerun-if-changed={}", libraries.display());
    if libraries.is_dir() {
        println!("cargo:rustc-cfg=rswap_dashboard_libraries");
        files.extend(list(&libraries)?);
    } else {
        println!("cargo:warning=built without the dashboard: use `cargo xtask build` to have it");
    }
    let entries = files.iter().map(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        format!("    ({name:?}, include_bytes!({path:?})),\n")
    });
    fs::write(variable("OUT_DIR")?.join("files.rs"), format!("&[\n{}]\n", entries.collect::<String>()))
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path()));
    let mut paths = paths.collect::<Result<Vec<_>, _>>()?;
    paths.sort();
    Ok(paths)
}
