//! `pgstub HOST:PORT`: listens there and answers until it is ended.

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let address = std::env::args().nth(1).context("usage: pgstub HOST:PORT")?;
    pgherd_stub::run(&address)
}
