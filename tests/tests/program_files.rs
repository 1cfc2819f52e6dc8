//! Programs that live in their files move with them: SQLite, and a build with hundreds of processes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::ensure;
use rswap_tests::{
    moves::{LIMIT, Pair, program},
    reason_to_skip, rounds, wait_for,
};

#[test]
fn sqlite_in_wal_mode() -> anyhow::Result<()> {
    if reason_to_skip("sqlite_in_wal_mode").is_some() {
        return Ok(());
    }
    let pair = Pair::new()?;
    let (log, mounted) = (pair.fleet.scratch().join("log"), pair.fleet.scratch().join("mounted"));
    let volume = format!("data:{}", mounted.display());
    let words = [program("sqlite.py"), log.clone(), mounted.join("bank.db")];
    let words = words.map(|path| path.to_string_lossy().into_owned());
    pair.a.run("sqlite", &["--volume", &volume], &["python3", &words[0], &words[1], &words[2]])?;
    let goes_on = || rounds::wait_for_more(&log, 50, LIMIT);
    goes_on()?;
    pair.three_moves_and("sqlite", goes_on)
}

/// Files that the build compiles.
const FILES: u32 = 60;

/// A program of many files, each of which adds its number.
fn write_sources(directory: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(directory)?;
    let mut main = String::from("#include <stdio.h>\nint main(void) { long sum = 0;\n");
    for number in 0..FILES {
        let body = (0..200).map(|n| format!("long f{number}_{n}(long a) {{ return a * {n} + {number}; }}\n"));
        let file = format!("{}long part{number}(void) {{ return {number}; }}\n", body.collect::<String>());
        fs::write(directory.join(format!("part{number}.c")), file)?;
        main += &format!("extern long part{number}(void); sum += part{number}();\n");
    }
    fs::write(directory.join("main.c"), main + "printf(\"%ld\\n\", sum); return 0; }\n")?;
    let makefile = "OBJECTS := $(patsubst %.c,%.o,$(wildcard *.c))\n\
                    all: program\n\
                    program: $(OBJECTS)\n\tgcc -o $@ $^\n\
                    %.o: %.c\n\tgcc -O1 -c -o $@ $<\n";
    Ok(fs::write(directory.join("Makefile"), makefile)?)
}

#[test]
fn a_build_moves_while_its_compilers_come_and_go() -> anyhow::Result<()> {
    if reason_to_skip("a_build_moves_while_its_compilers_come_and_go").is_some() {
        return Ok(());
    }
    let pair = Pair::new()?;
    let (sources, mounted) = (pair.fleet.scratch().join("sources"), pair.fleet.scratch().join("build"));
    write_sources(&sources)?;
    // It builds again and again until it is told to stop, and says what the program that it built says.
    let script = format!(
        "cp {}/* . && mkdir tmp && export TMPDIR=$PWD/tmp && \
         while :; do make -s -j2 all && ./program || exit; rm -f *.o program; done",
        sources.display()
    );
    let log: PathBuf = pair.fleet.scratch().join("a/build.log");
    let volume = format!("build:{}", mounted.display());
    let enter = format!("cd {} && {script}", mounted.display());
    pair.a.run("build", &["--volume", &volume], &["sh", "-c", &enter])?;
    let sum = (0..FILES).sum::<u32>().to_string();
    let builds = || -> anyhow::Result<usize> {
        let text = fs::read_to_string(&log).unwrap_or_default();
        ensure!(text.lines().all(|line| line == sum), "the build says: {text}");
        Ok(text.lines().count())
    };
    let goes_on = || {
        let before = builds()?;
        wait_for("another whole build", LIMIT, || Ok((builds()? > before).then_some(())))
    };
    goes_on()?;
    pair.three_moves_and("build", goes_on)
}
