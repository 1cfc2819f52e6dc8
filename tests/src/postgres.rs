//! A PostgreSQL server, and a client that keeps its connections: the simple query protocol, version 3, and no more of it.

use std::{
    fs,
    io::{BufReader, Read, Write},
    net::{Ipv4Addr, TcpStream},
    path::Path,
};

use anyhow::{Context, bail, ensure};

use crate::{converse::Connection, moves::START_LIMIT, netns::Netns, wait_for};

/// Where the server listens.
pub const PORT: u16 = 5432;

/// Makes a cluster in a directory, and becomes the server.
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

/// The command line of a server with its cluster in `data`; `huge_pages` is `on` or `off`.
pub fn command(data: &Path, huge_pages: &str) -> anyhow::Result<Vec<String>> {
    let settings =
        [format!("DATA={}", data.display()), format!("BIN={}", binaries()?), format!("HUGE={huge_pages}")];
    let words = ["env"].into_iter().chain(settings.iter().map(String::as_str)).chain(["sh", "-c", START]);
    Ok(words.map(str::to_owned).collect())
}

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

/// Waits until the server answers, and makes the tables.
pub fn make_tables(client: &Netns, server: Ipv4Addr) -> anyhow::Result<()> {
    let prepared = client.spawn("prepare", move || {
        // It listens before it is ready.
        let prepare = || prepare(&mut BufReader::new(TcpStream::connect((server, PORT))?));
        wait_for("the tables", START_LIMIT, || Ok(prepare().ok()))
    })?;
    prepared.join().map_err(|_| anyhow::anyhow!("the preparation panicked"))?
}

/// Accounts between which money goes.
pub const ACCOUNTS: u64 = 100;
/// What is in each at the beginning.
pub const BALANCE: u64 = 1000;

fn prepare(connection: &mut Connection) -> anyhow::Result<()> {
    start(connection)?;
    query(
        connection,
        &format!(
            "CREATE TABLE accounts (id int PRIMARY KEY, balance bigint);
             CREATE TABLE done (client int, question bigint, PRIMARY KEY (client, question));
             INSERT INTO accounts SELECT id, {BALANCE} FROM generate_series(0, {ACCOUNTS} - 1) AS id"
        ),
    )
    .map(drop)
}

/// Moves money from one account to another, in a transaction; the sum must hold, and every transaction that was
/// acknowledged must be there.
pub fn transfer(connection: &mut Connection, number: u64, question: u64) -> anyhow::Result<()> {
    if question == 1 {
        start(connection)?;
    }
    let (from, to) = ((number * 7 + question) % ACCOUNTS, (number * 13 + question * 3 + 1) % ACCOUNTS);
    // In the order of the numbers: nobody waits for one who waits for him.
    let (low, high) = (from.min(to), from.max(to));
    query(
        connection,
        &format!(
            "BEGIN;
             UPDATE accounts SET balance = balance - 5 WHERE id = {low};
             UPDATE accounts SET balance = balance + 5 WHERE id = {high};
             INSERT INTO done VALUES ({number}, {question});
             COMMIT"
        ),
    )?;
    let sum = query(connection, "SELECT sum(balance) FROM accounts")?;
    ensure!(sum == [[(ACCOUNTS * BALANCE).to_string()]], "the sum is {sum:?}");
    let last = query(connection, &format!("SELECT max(question) FROM done WHERE client = {number}"))?;
    ensure!(last == [[question.to_string()]], "transaction {last:?} is the last where it was {question}");
    Ok(())
}

fn start(connection: &mut Connection) -> anyhow::Result<()> {
    const VERSION: u32 = 3 << 16;
    let mut message = VERSION.to_be_bytes().to_vec();
    message.extend(b"user\0postgres\0database\0postgres\0\0");
    let length = (message.len() + 4) as u32;
    connection.get_mut().write_all(&[length.to_be_bytes().to_vec(), message].concat())?;
    rows(connection).map(drop)
}

/// The rows of an answer, as text.
pub fn query(connection: &mut Connection, text: &str) -> anyhow::Result<Vec<Vec<String>>> {
    let length = (text.len() + 5) as u32;
    let message = [b"Q", length.to_be_bytes().as_slice(), text.as_bytes(), b"\0"].concat();
    connection.get_mut().write_all(&message)?;
    rows(connection).with_context(|| format!("the answer to {text}"))
}

fn rows(connection: &mut Connection) -> anyhow::Result<Vec<Vec<String>>> {
    let mut rows = Vec::new();
    loop {
        let mut head = [0; 5];
        connection.read_exact(&mut head).context("waiting for an answer")?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let mut body = vec![0; length.checked_sub(4).context("a message of no length")?];
        connection.read_exact(&mut body).context("reading an answer")?;
        match head[0] {
            b'D' => rows.push(row(&body).context("a damaged row")?),
            b'E' => bail!("the server says: {}", String::from_utf8_lossy(&body).replace('\0', " ")),
            b'R' => ensure!(body == [0; 4], "the server wants to know who we are"),
            b'Z' => return Ok(rows),
            _ => {}
        }
    }
}

fn row(mut body: &[u8]) -> Option<Vec<String>> {
    let mut take = |count: usize| {
        let (taken, rest) = body.split_at_checked(count)?;
        body = rest;
        Some(taken)
    };
    let columns = u16::from_be_bytes(take(2)?.try_into().ok()?);
    let mut column = || {
        let length = i32::from_be_bytes(take(4)?.try_into().ok()?);
        let value = take(usize::try_from(length).unwrap_or(0))?;
        Some(String::from_utf8_lossy(value).into_owned())
    };
    (0..columns).map(|_| column()).collect()
}
