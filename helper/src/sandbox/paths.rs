//! Three spaces of paths, as types: a path of one is no path of another, though all three look alike.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::path::{Display, Path, PathBuf};

macro_rules! path_space {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub struct $name(PathBuf);

        impl $name {
            pub fn new(path: impl Into<PathBuf>) -> Self {
                Self(path.into())
            }

            pub fn join(&self, below: impl AsRef<Path>) -> Self {
                Self(self.0.join(below))
            }

            /// Is it the other, or below it?
            pub fn is_within(&self, other: &Self) -> bool {
                self.0.starts_with(&other.0)
            }

            /// Is any of these below it?
            pub fn has_below(&self, paths: &BTreeSet<Self>) -> bool {
                // A path is before all that are below it, and these are before all others.
                let next = paths.range((Bound::Excluded(self), Bound::Unbounded)).next();
                next.is_some_and(|next| next.is_within(self))
            }

            pub fn display(&self) -> Display<'_> {
                self.0.display()
            }
        }
    };
}

path_space! {
    /// A path of the host. Whoever builds the root file system can look there; a sandbox has left the host's mounts.
    SourcePath
}
path_space! {
    /// A path as a job sees it. Until the root file system is entered there is nothing at it: no system call takes it.
    JobPath
}

/// Where a job's path is while the root file system is built.
#[derive(Clone, Debug)]
pub struct NewRootPath(PathBuf);

impl AsRef<Path> for SourcePath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for NewRootPath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl NewRootPath {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    pub fn join(&self, below: impl AsRef<Path>) -> Self {
        Self(self.0.join(below))
    }
}

impl SourcePath {
    /// Without links.
    pub fn canonicalize(&self) -> std::io::Result<SourcePath> {
        self.0.canonicalize().map(SourcePath)
    }

    /// For what a job sees at the host's own place.
    pub fn same_for_job(&self) -> JobPath {
        JobPath(self.0.clone())
    }
}

impl JobPath {
    pub fn in_new_root(&self, root: &NewRootPath) -> NewRootPath {
        root.join(self.0.strip_prefix("/").unwrap_or(&self.0))
    }

    /// For who has entered the root file system: there it is the path itself.
    pub fn entered(&self) -> &Path {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_a_path_is_found_and_neither_itself_nor_its_neighbours() {
        let paths = ["/a", "/a-b", "/b/c/d"].map(JobPath::new).into_iter().collect();
        for (path, has_below) in [
            ("/", true),
            ("/a", false),
            ("/b", true),
            ("/b/c/d", false),
            ("/b/c/e", false),
        ] {
            assert_eq!(JobPath::new(path).has_below(&paths), has_below, "{path}");
        }
    }

    #[test]
    fn a_jobs_path_is_below_the_new_root() {
        let root = NewRootPath::new("/run/x");
        for (path, expected) in [("/", "/run/x/"), ("/etc/passwd", "/run/x/etc/passwd")] {
            assert_eq!(
                JobPath::new(path).in_new_root(&root).as_ref(),
                Path::new(expected)
            );
        }
    }
}
