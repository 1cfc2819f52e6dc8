//! PostgreSQL moves with its data directory while money goes to and fro: the sum holds, and nothing acknowledged is lost.

use std::{fs, io::BufReader, net::Ipv4Addr, path::Path};

use anyhow::Context;
use rswap_tests::{
    Host,
    converse::converse,
    huge_pages::HugePages,
    moves::{LIMIT, Pair, finish},
    postgres, reason_to_skip, skip, wait_for,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const PORT: u16 = 5432;

/// Makes a cluster in the volume, and becomes the server.
const START: &str = r#"
set -e
as_postgres="setpriv --reuid postgres --regid postgres --init-groups"
chown postgres:postgres "$DATA"
chmod 700 "$DATA"
$as_postgres "$BIN/initdb" -D "$DATA" -A trust --locale=C --no-sync > /dev/null
echo "host all all 0.0.0.0/0 trust" >> "$DATA/pg_hba.conf"
cd /
exec $as_postgres "$BIN/postgres" -D "$DATA" -c listen_addresses=0.0.0.0 -c unix_socket_directories= \
    -c huge_pages="$HUGE" -c shared_buffers=16MB -c max_connections=20 -c max_wal_size=64MB -c dynamic_shared_memory_type=mmap
"#;

/// The newest of Debian's directories with the server's programs.
fn binaries() -> anyhow::Result<String> {
    let mut found: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is not installed")?
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .filter(|path| path.join("postgres").exists())
        .collect();
    found.sort();
    Ok(found.pop().context("PostgreSQL is not installed")?.to_string_lossy().into_owned())
}

/// Moves a server three times while money goes to and fro.
fn the_sum_holds(huge_pages: &str) -> anyhow::Result<()> {
    let pair = Pair::new()?;
    let mounted = pair.fleet.scratch().join("pgdata");
    let mounted = mounted.to_string_lossy();
    let volume = format!("data:{mounted}");
    let (data, bin) = (format!("DATA={mounted}"), format!("BIN={}", binaries()?));
    let huge = format!("HUGE={huge_pages}");
    let net = format!("{SERVER}/24");
    let options = ["--net", &net, "--volume", &volume];
    pair.a.run("postgres", &options, &["env", &data, &bin, &huge, "sh", "-c", START])?;
    pair.wait_for_port(SERVER, PORT)?;
    let prepared = pair.fleet.client.spawn("prepare", || {
        // It listens before it is ready.
        let prepare =
            || postgres::prepare(&mut BufReader::new(std::net::TcpStream::connect((SERVER, PORT))?));
        wait_for("the tables", LIMIT, || Ok(prepare().ok()))
    })?;
    prepared.join().map_err(|_| anyhow::anyhow!("the preparation panicked"))??;
    let client = converse(&pair.fleet.client, (SERVER, PORT).into(), 4, postgres::transfer)?;
    client.wait_for(50, LIMIT)?;
    let moved = pair.three_moves_and("postgres", || {
        client.wait_for(50, LIMIT)?;
        let uses = [&pair.a, &pair.b].into_iter().try_fold(false, |any, host| -> anyhow::Result<bool> {
            Ok(any || host.has_instance("postgres")? && uses_huge_pages(host)?)
        })?;
        anyhow::ensure!(uses == (huge_pages == "on"), "its memory being in huge pages is {uses}");
        Ok(())
    });
    let talked = finish("postgres", client);
    moved.and(talked)?;
    assert!(!Path::new(&pair.fleet.scratch().join("a/volumes/postgres")).exists());
    Ok(())
}

/// Whether a process of the server has mapped huge pages that were set aside.
fn uses_huge_pages(host: &Host) -> anyhow::Result<bool> {
    let has = |pid: i32| {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
        smaps.lines().any(|line| line.split_whitespace().eq(["KernelPageSize:", "2048", "kB"]))
    };
    Ok(host.pids("postgres")?.into_iter().any(has))
}

#[test]
fn the_sum_holds_through_three_moves() -> anyhow::Result<()> {
    if reason_to_skip("the_sum_holds_through_three_moves").is_some() {
        return Ok(());
    }
    the_sum_holds("off")
}

#[test]
fn the_sum_holds_in_huge_pages() -> anyhow::Result<()> {
    const TEST: &str = "the_sum_holds_in_huge_pages";
    if reason_to_skip(TEST).is_some() {
        return Ok(());
    }
    // Two copies for the time of a move.
    let huge = HugePages::reserve(48)?;
    if !huge.enough {
        skip(TEST, "this machine has no 96 MiB in huge pages");
        return Ok(());
    }
    the_sum_holds("on")
}
