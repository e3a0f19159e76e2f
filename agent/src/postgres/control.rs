//! What lies in a data directory, as `pg_controldata` tells.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use pgherd_cluster::name::{Lsn, SystemId, Timeline};

use super::place;
use super::programs::{Programs, ToolError};

/// The state in the control file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlState {
    /// A primary that was stopped in order: its last record is the shutdown checkpoint.
    ShutDown,
    /// A standby that was stopped in order.
    ShutDownInRecovery,
    /// A primary that runs, or was ended.
    InProduction,
    /// A standby that runs, or was ended.
    InArchiveRecovery,
    /// Anything between.
    Other,
}

/// The parts of the control file that decisions rest on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// The state.
    pub state: ControlState,
    /// The system identifier.
    pub system_id: SystemId,
    /// Where the latest checkpoint record begins.
    pub checkpoint: Lsn,
    /// The timeline of the latest checkpoint.
    pub timeline: Timeline,
    /// Settings that a standby may not undercut, by PostgreSQL's names.
    pub floors: Vec<(&'static str, u32)>,
}

/// What lies where the data directory should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataDir {
    /// Nothing, or an empty directory.
    Empty,
    /// Files, but not PostgreSQL's: the first few names.
    Foreign(Vec<String>),
    /// A cluster.
    Cluster {
        /// Its control file.
        control: Control,
        /// Whether it comes up as a standby.
        standby: bool,
    },
}

/// Settings in the control file that a standby needs at least as high, with PostgreSQL's label.
const FLOORS: [(&str, &str); 5] = [
    ("max_connections", "max_connections setting"),
    ("max_worker_processes", "max_worker_processes setting"),
    ("max_wal_senders", "max_wal_senders setting"),
    ("max_prepared_transactions", "max_prepared_xacts setting"),
    ("max_locks_per_transaction", "max_locks_per_xact setting"),
];

const CONTROLDATA_MAX: Duration = Duration::from_secs(10);

/// Looks at the data directory.
///
/// # Errors
/// When it cannot be read, or `pg_controldata` fails on it.
pub async fn inspect(programs: &Programs, data_dir: &Path) -> Result<DataDir, ToolError> {
    if place::marked(data_dir).is_some() {
        return Ok(DataDir::Empty); // Whatever lies there is half of something.
    }
    let mut names = Vec::new();
    match tokio::fs::read_dir(data_dir).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(DataDir::Empty),
        Err(error) => {
            return Err(super::programs::file_error("reading the data directory", data_dir)(
                error,
            ));
        }
        Ok(mut entries) => {
            while let Ok(Some(entry)) = entries.next_entry().await {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
    }
    names.retain(|name| !place::is_foreign(name));
    if names.is_empty() {
        return Ok(DataDir::Empty);
    }
    if !names.iter().any(|name| name == "PG_VERSION") {
        names.sort();
        names.truncate(5);
        return Ok(DataDir::Foreign(names));
    }
    let standby = names.iter().any(|name| name == "standby.signal");
    Ok(DataDir::Cluster {
        control: read_control(programs, data_dir).await?,
        standby,
    })
}

async fn read_control(programs: &Programs, data_dir: &Path) -> Result<Control, ToolError> {
    let args = [std::ffi::OsStr::new("-D"), data_dir.as_os_str()];
    let output = programs.run("pg_controldata", &args, &[], CONTROLDATA_MAX).await?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn parse(text: &str) -> Result<Control, ToolError> {
    let fields: HashMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(k, v)| (k, v.trim()))
        .collect();
    let missing = |what: &str| ToolError::Unexpected {
        program: "pg_controldata".to_owned(),
        what: format!("no {what:?}"),
    };
    let field = |name: &str| fields.get(name).copied().ok_or_else(|| missing(name));
    let state = match field("Database cluster state")? {
        "shut down" => ControlState::ShutDown,
        "shut down in recovery" => ControlState::ShutDownInRecovery,
        "in production" => ControlState::InProduction,
        "in archive recovery" => ControlState::InArchiveRecovery,
        _ => ControlState::Other,
    };
    let number = |name: &str| field(name)?.parse::<u32>().map_err(|_| missing(name));
    let mut floors = Vec::with_capacity(FLOORS.len());
    for (setting, label) in FLOORS {
        floors.push((setting, number(label)?));
    }
    Ok(Control {
        state,
        system_id: field("Database system identifier")?
            .parse()
            .map_err(|_| missing("Database system identifier"))?,
        checkpoint: field("Latest checkpoint location")?
            .parse()
            .map_err(|_| missing("Latest checkpoint location"))?,
        timeline: Timeline(number("Latest checkpoint's TimeLineID")?),
        floors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHUT_DOWN: &str = "pg_control version number:            1300\n\
        Database system identifier:           7710403737510608197\n\
        Database cluster state:               shut down\n\
        pg_control last modified:             Fri 20 Nov 2026 11:48:53 PM UTC\n\
        Latest checkpoint location:           0/406EC78\n\
        Latest checkpoint's TimeLineID:       2\n\
        max_connections setting:              50\n\
        max_worker_processes setting:         8\n\
        max_wal_senders setting:              10\n\
        max_prepared_xacts setting:           0\n\
        max_locks_per_xact setting:           64\n";

    #[test]
    fn the_control_file_is_read() {
        let control = parse(SHUT_DOWN).expect("a captured text");
        assert_eq!(control.state, ControlState::ShutDown);
        assert_eq!(control.system_id, SystemId(7_710_403_737_510_608_197));
        assert_eq!(control.checkpoint.to_string(), "0/406EC78");
        assert_eq!(control.timeline, Timeline(2));
        assert!(control.floors.contains(&("max_connections", 50)));
    }

    #[test]
    fn a_text_without_a_needed_line_is_an_error_that_names_it() {
        let error = parse("Database cluster state: shut down\n").expect_err("most of it is missing");
        assert!(error.to_string().contains("max_connections setting"), "{error}");
    }
}
