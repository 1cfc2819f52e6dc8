//! `rswap check INSTANCE HOST` says what the other host would refuse, and nothing is made there.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use rswap_tests::{Fleet, Host, HostOptions, reason_to_skip, wait_for};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);

/// Hosts that share no directory.
const OWN_FILES: &str = "[files]\nshared = []\n";

/// Opens the file that it is given, in the way that it is given, says so, and waits.
const OPENS: &str = "
import sys, time
file = open(sys.argv[1], sys.argv[2])
print('open', flush=True)
while True: time.sleep(0.1)
";

struct Scene {
    // Dropped in this order: the hosts live in the fleet's network.
    a: Host,
    b: Host,
    /// With other contents on the second host.
    differs: PathBuf,
    same: PathBuf,
    fleet: Fleet,
}

impl Scene {
    fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let file = |name: &str, text: &str| -> anyhow::Result<PathBuf> {
            let path = fleet.scratch().join(name);
            fs::write(&path, text)?;
            Ok(path)
        };
        let (differs, there) = (file("differs", "here")?, file("differs.b", "else")?);
        let same = file("same", "same")?;
        let a = fleet.host("a", &HostOptions { more: OWN_FILES.into(), ..HostOptions::default() })?;
        let mounts = vec![(there, differs.clone())];
        let b = fleet.host("b", &HostOptions { more: OWN_FILES.into(), mounts, ..HostOptions::default() })?;
        Ok(Self { a, b, differs, same, fleet })
    }

    fn open(&self, name: &str, file: &Path, how: &str) -> anyhow::Result<()> {
        self.a.run(name, &[], &["python3", "-c", OPENS, &file.to_string_lossy(), how])?;
        let log = self.fleet.scratch().join(format!("a/{name}.log"));
        wait_for("the file to be open", LIMIT, || {
            Ok(fs::read_to_string(&log).unwrap_or_default().contains("open").then_some(()))
        })
    }

    /// What `rswap check` refuses: (item, reason, host).
    fn refused(&self, arguments: &[&str]) -> anyhow::Result<Vec<(String, String, Option<String>)>> {
        let output = self.a.rswap(&[&["check", "--json"], arguments].concat())?.output()?;
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        let refused = rows.iter().filter(|row| row["severity"] == "refused");
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let found: Vec<_> = refused
            .map(|row| {
                (
                    text(&row["item"]).unwrap_or_default(),
                    text(&row["reason"]).unwrap_or_default(),
                    text(&row["host"]),
                )
            })
            .collect();
        assert_eq!(output.status.success(), found.is_empty(), "{found:?}");
        Ok(found)
    }
}

#[test]
fn a_file_that_differs_is_named_before_anything_is_made() -> anyhow::Result<()> {
    if reason_to_skip("a_file_that_differs_is_named_before_anything_is_made").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let there = scene.b.migrate_address();
    scene.open("reader", &scene.differs, "rb")?;
    assert_eq!(scene.refused(&["reader"])?, []);
    let found = scene.refused(&["reader", &there])?;
    let [(item, reason, host)] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((item.as_str(), host.as_ref()), (&*scene.differs.to_string_lossy(), Some(&there)));
    assert!(reason.contains("differs"), "{reason}");
    assert!(!scene.b.has_processes()?, "the question made something");
    let table = scene.a.rswap(&["check", "reader", &there])?.output()?;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("differs") && table.contains("can't migrate to"), "{table}");

    let reason = scene.a.migrate("reader", &there)?.end()?.expect_err("it was moved to another file");
    assert!(reason.contains("differs"), "{reason}");
    assert!(scene.a.has_instance("reader")? && !scene.b.has_processes()?);
    Ok(())
}

#[test]
fn a_file_that_is_the_same_is_no_obstacle_but_one_that_is_written_is() -> anyhow::Result<()> {
    if reason_to_skip("a_file_that_is_the_same_is_no_obstacle_but_one_that_is_written_is").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let there = scene.b.migrate_address();
    scene.open("writer", &scene.same, "r+b")?;
    let found = scene.refused(&["writer"])?;
    assert!(found.len() == 1 && found[0].0.contains("same, open for writing"), "{found:?}");
    assert!(found[0].1.contains("--volume"), "{found:?}");
    let reason = scene.a.migrate("writer", &there)?.end()?.expect_err("its file stayed behind");
    assert!(reason.contains("--volume"), "{reason}");

    scene.open("reader", &scene.same, "rb")?;
    assert_eq!(scene.refused(&["reader", &there])?, []);
    scene.a.migrate("reader", &there)?.succeed()?;
    scene.b.wait_for_instance("reader")?;
    // The name is taken there now.
    scene.open("reader", &scene.same, "rb")?;
    let found = scene.refused(&["reader", &there])?;
    assert!(found.len() == 1 && found[0].1.contains("running on this host"), "{found:?}");
    Ok(())
}
