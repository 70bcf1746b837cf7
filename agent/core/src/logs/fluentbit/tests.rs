use super::super::settings::LogSettings;
use super::*;

fn nothing(_: &str) -> Vec<String> {
    Vec::new()
}

fn migrated(text: &str) -> Migration {
    let migration = migrate(&sections(text, &nothing).unwrap());
    // Whatever comes out is accepted by the agent.
    let file = LogFile::parse(&migration.to_yaml()).unwrap_or_else(|error| panic!("{error}: {}", migration.to_yaml()));
    assert_eq!(file, migration.file);
    file.apply(LogSettings::new(Layout::FluentBit)).unwrap();
    migration
}

const CLASSIC: &str = r#"
[SERVICE]
    Flush         5
    Grace         30
    storage.path  /var/fluent-bit/state/flb-storage/
    Parsers_File  parsers.conf
@SET unused=1
[INPUT]
    Name              tail
    Tag               application.*
    Exclude_Path      /var/log/containers/cloudwatch-agent*, /var/log/containers/fluent-bit*
    Path              /var/log/containers/*.log
    multiline.parser  docker, cri
    DB                /var/fluent-bit/state/flb_container.db
    Read_from_Head    ${READ_FROM_HEAD}
[INPUT]
    Name              tail
    Tag               dataplane.tail.*
    Path              /var/log/containers/aws-node*, /var/log/containers/kube-proxy*
[INPUT]
    Name              systemd
    Tag               dataplane.systemd.*
    Systemd_Filter    _SYSTEMD_UNIT=containerd.service
    Systemd_Filter    _SYSTEMD_UNIT=kubelet.service
    Path              /var/log/journal
    Read_From_Tail    On
[INPUT]
    Name              systemd
    Tag               everything
    Path              /var/log/journal
    Read_From_Tail    On
[INPUT]
    Name              tail
    Tag               host.messages
    Path              /var/log/messages
[FILTER]
    Name                kubernetes
    Match               application.*
    Merge_Log           On
    Merge_Log_Key       log_processed
    K8S-Logging.Parser  On
    K8S-Logging.Exclude Off
    Labels              Off
    Annotations         Off
    Use_Kubelet         On
[FILTER]
    Name                aws
    Match               dataplane.*
[FILTER]
    Name                multiline
    Match               *
    multiline.key_content log
    multiline.parser    java, mine
[FILTER]
    Name                grep
    Match               *
    Exclude             log health
[MULTILINE_PARSER]
    name          mine
    type          regex
    flush_timeout 1000
    rule      "start_state"   "/^\d{4}-\d{2}/"  "cont"
    rule      "cont"          "/^\s+at.*/"      "cont"
[PARSER]
    Name    app
    Format  regex
    Regex   ^(?<level>[A-Z]+) (?<n>\d+)$
    Types   n:integer
    Time_Key time
[OUTPUT]
    Name                cloudwatch_logs
    Match               application.*
    region              ${AWS_REGION}
    log_group_name      /aws/containerinsights/${CLUSTER_NAME}/application
    log_stream_prefix   ${HOST_NAME}-
    auto_create_group   true
    log_retention_days  7
    retry_limit         no_limits
[OUTPUT]
    Name                cloudwatch_logs
    Match               dataplane.tail.*
    region              eu-west-1
    log_group_name      /aws/containerinsights/${CLUSTER_NAME}/dataplane
    log_stream_prefix   ${HOST_NAME}-
[OUTPUT]
    Name                cloudwatch_logs
    Match               host.*
    log_group_name      /aws/containerinsights/${CLUSTER_NAME}/host
    log_stream_prefix   ${HOST_NAME}.
[OUTPUT]
    Name                s3
    Match               *
"#;

fn check_container_insights(migration: &Migration) {
    let file = &migration.file;
    assert_eq!((file.flush_seconds, file.retention_days), (Some(5.0), Some(7)));
    assert_eq!(file.group.as_deref(), Some("/aws/containerinsights/{cluster}/application"));
    assert_eq!(file.stream.as_deref(), Some("{node}-application.var.log.containers.{file}"));
    assert_eq!(file.merge, Some(Merge::Under("log_processed".into())));
    assert_eq!((file.keep_log, file.labels, file.annotations), (None, Some(false), Some(false)));
    assert_eq!((file.honour_exclude, file.honour_parser), (Some(false), Some(true)));
    assert_eq!(file.exclude, ["cloudwatch-agent*", "fluent-bit*"]);
}

#[test]
fn container_insights_own_configuration() {
    let migration = migrated(CLASSIC);
    check_container_insights(&migration);
    let file = &migration.file;
    let route = &file.routes.as_ref().unwrap()[0];
    assert_eq!(route.files, ["aws-node*", "kube-proxy*"]);
    assert_eq!(route.stream, "{node}-dataplane.tail.var.log.containers.{file}");
    assert_eq!((route.kubernetes, route.node), (Some(false), Some(true)), "the filters for application.* do not see it");
    assert_eq!((file.host_files[0].path.as_str(), file.host_files[0].stream.as_str()), ("/var/log/messages", "{node}.host.messages"));
    assert_eq!(file.multiline, ["java"]);
    let rule = RuleEntry { name: "mine".into(), start: r"^\d{4}-\d{2}".into(), next: Some(r"^\s+at.*".into()) };
    assert_eq!((file.multiline_rules.as_slice(), file.multiline_flush_seconds), (&[rule][..], Some(1.0)));
    assert_eq!((file.parsers[0].name.as_str(), file.parsers[0].types["n"].as_str()), ("app", "integer"));
    let missing: Vec<&str> = migration.missing.iter().map(|(what, _)| what.as_str()).collect();
    let units = Some(vec!["containerd.service".to_owned(), "kubelet.service".to_owned()]);
    let journal = JournalEntry { dirs: Some(vec!["/var/log/journal".into()]), host: Some(true), units, read_from: None };
    assert_eq!(file.journal, Some(journal));
    for what in ["[INPUT] systemd everything", "[FILTER] grep", "[OUTPUT] s3", "[INPUT] tail read_from_head ${READ_FROM_HEAD}"] {
        assert!(missing.contains(&what), "{what} in {missing:?}");
    }
}

#[test]
fn the_same_as_yaml() {
    let yaml = r#"
service: {flush: 5}
multiline_parsers:
  - name: mine
    type: regex
    rules:
      - {state: start_state, regex: '/^\d/', next_state: cont}
pipeline:
  inputs:
    - name: tail
      tag: application.*
      path: /var/log/containers/*.log
      exclude_path: /var/log/containers/cloudwatch-agent*, /var/log/containers/fluent-bit*
      multiline.parser: docker, cri, mine
  filters:
    - {name: kubernetes, match: 'application.*', merge_log: on, merge_log_key: log_processed, labels: off, annotations: off, k8s-logging.parser: on}
  outputs:
    - name: cloudwatch_logs
      match: 'application.*'
      log_group_name: /aws/containerinsights/${CLUSTER_NAME}/application
      log_stream_prefix: ${HOST_NAME}-
      log_retention_days: 7
"#;
    let migration = migrated(yaml);
    check_container_insights(&migration);
    assert_eq!((migration.file.multiline_rules[0].start.as_str(), migration.file.multiline_rules[0].next.as_deref()), (r"^\d", None));
}

#[test]
fn a_config_map_with_its_includes() {
    let indent = |text: &str| text.lines().map(|line| format!("    {line}\n")).collect::<String>();
    let (service, rest) = CLASSIC.split_once("@SET unused=1").unwrap();
    let text = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: fluent-bit-config\ndata:\n  fluent-bit.conf: |\n{}    @INCLUDE application-log.conf\n  application-log.conf: |\n{}  parsers.conf: |\n    [PARSER]\n        Name own\n        Format json\n",
        indent(service),
        indent(rest),
    );
    let migration = migrated(&text);
    check_container_insights(&migration);
    assert!(migration.file.parsers.iter().any(|parser| parser.name == "own"));
}

#[test]
fn templates_keys_and_what_is_not_known() {
    let output = |more: &str| {
        migrated(&format!(
            "[INPUT]\nName tail\nTag kube.*\nPath /var/log/containers/*_shop_*.log\n[OUTPUT]\nName cloudwatch\nMatch kube.*\nregion eu-west-1\nlog_group_name fallback\nlog_stream_name fixed\n{more}"
        ))
    };
    let migration = output(
        "log_group_template /eks/$kubernetes['namespace_name'].$kubernetes['labels']['app']\nlog_stream_template $kubernetes['pod_name'].$tag\nlog_key log\nlog_format json/emf\nlog_group_class INFREQUENT_ACCESS\nrole_arn arn:x",
    );
    let file = &migration.file;
    assert_eq!(file.group.as_deref(), Some("/eks/{namespace}.{label:app}"));
    assert_eq!(file.stream.as_deref(), Some("{pod}.kube.var.log.containers.{file}"));
    assert_eq!((file.record, file.emf, file.class), (Some(Layout::Raw), Some(true), Some(GroupClass::InfrequentAccess)));
    assert_eq!((file.group_else.as_deref(), file.stream_else.as_deref()), (Some("fallback"), Some("fixed")));
    assert_eq!(file.include, ["*_shop_*.log"]);
    assert_eq!(migration.environment["AWS_REGION"], "eu-west-1");
    assert!(migration.missing.iter().any(|(what, _)| what.contains("role_arn")));
    let migration = output("log_group_template /x/$unknown['a']");
    assert_eq!((migration.file.group.as_deref(), migration.file.group_else), (Some("fallback"), None));
    assert!(migration.missing.iter().any(|(_, why)| why.contains("unknown")));
    let migration = output("log_stream_template $kubernetes['docker_id']");
    assert_eq!((migration.file.stream.as_deref(), migration.file.stream_else.as_deref()), (Some("{fullid}"), Some("fixed")));
}

/// There every pod goes to the fixed name, whatever its labels.
#[test]
fn a_template_of_labels_that_no_record_has() {
    for (labels, group) in [("On", "/eks/{label:app}"), ("Off", "fixed")] {
        let migration = migrated(&format!(
            "[INPUT]\n  Name tail\n  Tag a.*\n  Path /var/log/containers/*.log\n\
             [FILTER]\n  Name kubernetes\n  Match a.*\n  Labels {labels}\n\
             [OUTPUT]\n  Name cloudwatch_logs\n  Match a.*\n  region r\n  log_group_name fixed\n  log_stream_prefix p-\n  \
             log_group_template /eks/$kubernetes['labels']['app']\n"
        ));
        assert_eq!(migration.file.group.as_deref(), Some(group));
        assert_eq!(migration.missing.iter().any(|(_, why)| why.contains("not in the records")), labels == "Off");
    }
}

/// What Fluent Bit's filter does not do unless it says so, the agent would do.
#[test]
fn what_is_off_there_is_off_here() {
    let migrated = |filter: &str| {
        migrated(&format!(
            "[INPUT]\n  Name tail\n  Tag a.*\n  Path /var/log/containers/*.log\n{filter}\
             [OUTPUT]\n  Name cloudwatch_logs\n  Match a.*\n  region r\n  log_group_name g\n  log_stream_prefix p-\n"
        ))
    };
    for (filter, without) in
        [("", true), ("[FILTER]\n  Name kubernetes\n  Match a.*\n", false), ("[FILTER]\n  Name kubernetes\n  Match b.*\n", true)]
    {
        let migration = migrated(filter);
        let settings = migration.file.apply(LogSettings::container_insights(Layout::FluentBit)).unwrap();
        assert_eq!((settings.record.merge, settings.honour_exclude, settings.honour_parser), (Merge::Off, false, false), "{filter}");
        assert_eq!(migration.missing.iter().any(|(_, why)| why.contains("metadata")), without, "{filter}");
    }
    let migration = migrated("[FILTER]\n  Name aws\n  Match *\n");
    assert!(migration.missing.iter().any(|(what, _)| what.contains("aws")), "the main input has no such members here");
}

#[test]
fn what_is_no_configuration() {
    assert!(matches!(sections("Name tail\n[INPUT]", &nothing), Err(ReadError::Line { line: 1, .. })));
    assert!(matches!(sections("kind: Pod", &nothing), Err(ReadError::Foreign)));
    assert!(matches!(sections("[SERVICE]\n@INCLUDE x.conf", &nothing), Err(ReadError::Include(name)) if name == "x.conf"));
    assert!(matches!(sections("[SERVICE]\n@INCLUDE x", &|_| vec!["[A]\n@INCLUDE x".into()]), Err(ReadError::Depth)));
    assert!(matches!(sections(":\n  - : [", &nothing), Err(ReadError::Yaml(_))));
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "(\\[[A-Z]{0,6}\\]\n|[a-z@$\"{}: ]{0,20}\n){0,12}") {
        if let Ok(found) = sections(&text, &nothing) {
            let _ = migrate(&found).to_yaml();
        }
    }
}

#[test]
fn a_path_with_a_control_character_stays_readable() {
    migrated("[INPUT]\n    Name tail\n    Path /var/log/c\u{7f}nt\u{85}ainers/*.log\u{feff}x\n");
}

#[test]
fn control_characters_end_no_comment() {
    let migration = migrated(
        "[INPUT]\n  Name tail\n  Tag a.*\n  Path /var/log/containers/*.log\n  multiline.parser do\0cker, cri\n\
         [OUTPUT]\n  Name cloudwatch_logs\n  Match a.*\n  region r\n  log_group_name g\n  log_stream_prefix p-\n",
    );
    assert!(migration.to_yaml().contains("do\u{fffd}cker"), "{}", migration.to_yaml());
}

#[test]
fn a_flush_that_is_no_time_is_named_and_never_written() {
    for (text, expected) in [("5", Some(5.0)), ("0.001", Some(0.05)), ("1e9", Some(3600.0)), ("inf", None), ("nan", None), ("soon", None)] {
        let migration = migrated(&format!("[SERVICE]\n    Flush {text}\n"));
        assert_eq!(migration.file.flush_seconds, expected, "{text}");
        assert_eq!(migration.missing.iter().any(|(what, _)| what.contains("flush")), expected.is_none(), "{text}");
    }
}

#[test]
fn databases_elsewhere_are_named() {
    let input = |db: &str| {
        let tail = format!("[INPUT]\n    Name tail\n    Tag kube.*\n    Path /var/log/containers/*.log\n    DB {db}\n");
        let output = "[OUTPUT]\n    Name cloudwatch_logs\n    Match kube.*\n    log_group_name g\n    log_stream_prefix s-\n";
        migrated(&format!("{tail}{output}")).file.fluent_bit_state
    };
    assert_eq!(input("/var/log/flb_kube.db").as_deref(), Some("/var/log"));
    assert_eq!(input("/var/fluent-bit/state/flb_container.db"), None, "as it is without");
    assert_eq!(input("flb.db"), None, "nobody knows where that is");
}
