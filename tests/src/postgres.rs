//! A PostgreSQL client that keeps its connections: the simple query protocol, version 3, and no more of it.

use std::io::{Read, Write};

use anyhow::{Context, bail, ensure};

use crate::converse::Connection;

/// Accounts between which money goes.
pub const ACCOUNTS: u64 = 100;
/// What is in each at the beginning.
pub const BALANCE: u64 = 1000;

/// Makes the tables.
pub fn prepare(connection: &mut Connection) -> anyhow::Result<()> {
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
