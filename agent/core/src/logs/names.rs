//! What the names under /var/log/containers and /var/log/pods say of a container.

use serde::{Deserialize, Serialize};

/// A container instance, as its file names tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContainerRef {
    /// Namespace of the pod.
    pub namespace: String,
    /// Pod name.
    pub pod: String,
    /// Container name.
    pub container: String,
    /// 64 hexadecimal digits; empty where only the pods tree was seen.
    pub id: String,
    /// Pod uid; empty where only the flat directory was seen.
    pub uid: String,
}

/// Reads `<pod>_<namespace>_<container>-<64 hex>.log`, the flat directory's form. Names hold no underscore, so it parts
/// them; the id is fixed in length.
pub fn parse_flat(file_name: &str) -> Option<ContainerRef> {
    let stem = file_name.strip_suffix(".log")?;
    let (pod, rest) = stem.split_once('_')?;
    let (namespace, rest) = rest.split_once('_')?;
    let (container, id) = rest.rsplit_once('-')?;
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if pod.is_empty() || namespace.is_empty() || container.is_empty() || !is_id {
        return None;
    }
    Some(ContainerRef {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        container: container.to_owned(),
        id: id.to_owned(),
        uid: String::new(),
    })
}

/// Reads the directories `<namespace>_<pod>_<uid>` and `<container>` of the pods tree.
pub fn parse_pod_dir(pod_dir: &str, container: &str) -> Option<ContainerRef> {
    let (namespace, rest) = pod_dir.split_once('_')?;
    let (pod, uid) = rest.rsplit_once('_')?;
    if namespace.is_empty() || pod.is_empty() || uid.is_empty() || container.is_empty() {
        return None;
    }
    Some(ContainerRef {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        container: container.to_owned(),
        id: String::new(),
        uid: uid.to_owned(),
    })
}

/// A rotated sibling of a live log file: `0.log.20261121-033518`, or that with `.gz`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rotated {
    /// What follows the live name; the kubelet's time stamps sort in order of rotation.
    pub suffix: String,
    /// Compressed.
    pub gz: bool,
}

/// Reads `name` as a rotated sibling of `live`; `.tmp` files are half-written copies.
pub fn parse_rotated(live: &str, name: &str) -> Option<Rotated> {
    let suffix = name.strip_prefix(live)?.strip_prefix('.')?;
    if suffix.is_empty() || suffix.ends_with("tmp") {
        return None;
    }
    let gz = suffix.strip_suffix(".gz");
    Some(Rotated { suffix: gz.unwrap_or(suffix).to_owned(), gz: gz.is_some() })
}

/// Matches `*` (any run of characters but `/`) and `?` against a whole name.
pub fn glob(pattern: &str, name: &str) -> bool {
    fn matches(pattern: &[u8], name: &[u8]) -> bool {
        // Two cursors with one place to return to: linear but for the last star.
        let (mut p, mut n) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while n < name.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(&byte) if (byte == b'?' && name[n] != b'/') || byte == name[n] => {
                    p += 1;
                    n += 1;
                }
                _ => match star {
                    Some((at, from)) if name[from] != b'/' => {
                        star = Some((at, from + 1));
                        p = at + 1;
                        n = from + 1;
                    }
                    _ => return false,
                },
            }
        }
        pattern[p..].iter().all(|&byte| byte == b'*')
    }
    matches(pattern.as_bytes(), name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_names() {
        let id = "bdcf5b69a76602aeae355a5751ae7acce946b03f8c251b031aadaabf4005753b";
        let flat = parse_flat(&format!("web-6b9c4cb4dc-8zpz5_default_c-x-{id}.log")).unwrap();
        assert_eq!(
            (flat.pod.as_str(), flat.namespace.as_str(), flat.container.as_str(), flat.id.as_str()),
            ("web-6b9c4cb4dc-8zpz5", "default", "c-x", id)
        );
        let tree = parse_pod_dir("default_tmp_1a5f8108-28f7-40eb-847c-16c66e3767bb", "tmp").unwrap();
        assert_eq!((tree.pod.as_str(), tree.uid.as_str()), ("tmp", "1a5f8108-28f7-40eb-847c-16c66e3767bb"));
        for name in ["web.log", "a_b_c-123.log", "_b_c-x.log", "x", ""] {
            assert_eq!(parse_flat(name), None, "{name}");
        }
    }

    #[test]
    fn rotated_siblings() {
        assert_eq!(parse_rotated("0.log", "0.log.20261121-033518"), Some(Rotated { suffix: "20261121-033518".into(), gz: false }));
        assert_eq!(parse_rotated("0.log", "0.log.20261121-033518.gz"), Some(Rotated { suffix: "20261121-033518".into(), gz: true }));
        for name in ["0.log", "1.log.x", "0.log.20261121-033518.tmp", "0.log.tmp", "0.logx"] {
            assert_eq!(parse_rotated("0.log", name), None, "{name}");
        }
    }

    #[test]
    fn globs() {
        for (pattern, name, expected) in [
            ("*", "a", true),
            ("kube-proxy*", "kube-proxy-x_kube-system_c.log", true),
            ("*_kube-system_*", "a_kube-system_b.log", true),
            ("*_kube-system_*", "a_default_b.log", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*.log", "dir/x.log", false),
            ("a*b*c", "aXbYbZc", true),
            ("", "", true),
        ] {
            assert_eq!(glob(pattern, name), expected, "{pattern} {name}");
        }
    }
}
